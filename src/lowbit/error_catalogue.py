"""What ``lowbit explain`` says: one entry an error code, and a test that every code raised has one.

A code never changes its meaning and is never used again. Its first digits are its kind, and fix the exit
status (``errors``). The message that was printed names the file, the numbers and the way out of that one
case; the entry here says what the error is in general, where it comes from, and what else can be done.
"""

from __future__ import annotations

from dataclasses import dataclass

KINDS = {
    "E01": "the command line",
    "E02": "the checkpoint",
    "E03": "files and devices of this machine",
    "E04": "not supported here",
    "E05": "not enough memory or disk",
    "E06": "network, hub or package index",
    "E07": "a fault in lowbit",
    "E08": "the address to listen on",
}


@dataclass(frozen=True)
class Entry:
    """One error. ``meaning``: what it is and what causes it. ``way_out``: what to do."""

    title: str
    meaning: str
    way_out: str


_DOWNLOAD_AGAIN = "Download the file again (lowbit pull MODEL), or take it from another source."
_REPORT = "Run the same command with --debug and report the traceback with the model's name."

CATALOGUE: dict[str, Entry] = {
    "E0101": Entry(
        "unknown command",
        "The first word after lowbit is not one of its commands.",
        "lowbit --help lists the commands. To serve a model: lowbit serve MODEL.",
    ),
    "E0102": Entry(
        "unknown option",
        "The command has no option of that name. Options are never guessed from an abbreviation, because a "
        "silently misread option would change what is served.",
        "Take the name the message proposes, or see lowbit COMMAND --help and docs/options.md.",
    ),
    "E0103": Entry(
        "bad value of an option",
        "A flag, a LOWBIT_* variable or a field of Settings has a value of the wrong type, outside its range "
        "or not among its choices. The message shows what was found and what is allowed.",
        "Correct the value; if you set no such flag, look for the variable: env | grep LOWBIT_.",
    ),
    "E0104": Entry(
        "the command line cannot be understood",
        "A flag lacks its value, a switch was given one, or there is a word too many.",
        "See lowbit COMMAND --help. A value that begins with a dash is written --flag=-value.",
    ),
    "E0105": Entry(
        "refused option",
        "The option asks for something lowbit does not do on principle. Running Python code that came with a "
        "model (--trust-remote-code) is the one case: a checkpoint is data from strangers.",
        "Leave the option out. Models whose architecture is built in (lowbit models) never need it.",
    ),
    "E0106": Entry(
        "more than one device",
        "A parallel size (--tp-size, --dp-size and their like) other than 1: this version of lowbit runs a "
        "model on one device. It is refused rather than ignored: one device's memory may not do.",
        "Give the option the value 1 or leave it out.",
    ),
    "E0107": Entry(
        "two models named",
        "The command line names one model as MODEL and another with --model or --model-path.",
        "Name one of them.",
    ),
    "E0108": Entry(
        "no such error code",
        "lowbit explain was asked for a code that no error has.",
        "lowbit explain without a code lists all of them.",
    ),
    "E0109": Entry(
        "no prompt",
        "lowbit generate got neither --prompt nor text on its standard input, or the text is empty.",
        "lowbit generate --prompt 'Once upon a time', or pipe the prompt into the command.",
    ),
    "E0203": Entry(
        "incomplete file",
        "The file is shorter than its own header says. Almost always a download that was cut off.",
        _DOWNLOAD_AGAIN,
    ),
    "E0209": Entry(
        "missing tensor",
        "A tensor the architecture needs is in none of the checkpoint's files: a shard is missing, the file "
        "was made by a faulty converter, or config and weights are from different models.",
        "Compare the files with the model's page and download what is missing (lowbit pull MODEL).",
    ),
    "E0210": Entry(
        "a tensor's shape disagrees with the config",
        "The config asks for other dimensions than the tensor has. Config and weights are from different "
        "models, or the vocabulary was extended and only one of them changed.",
        "Use the config.json that belongs to these weights.",
    ),
    "E0211": Entry(
        "unknown checkpoint format",
        "No reader recognises the checkpoint, or more than one does. Formats are recognised by "
        "quantization_config in config.json and by the names of the tensors.",
        "lowbit models lists the formats that can be read. Where several claim the model, correct "
        "quantization_config.",
    ),
    "E0216": Entry(
        "bad config",
        "A key of config.json or of the GGUF metadata is missing, has the wrong type, or a value no model "
        "can have. Nothing that changes the meaning of a model is guessed.",
        "Take the config of the original model. " + _DOWNLOAD_AGAIN,
    ),
    "E0217": Entry(
        "a tensor without a place",
        "The checkpoint holds a tensor that the architecture does not use and that is not on its short list "
        "of known unused names. Serving without it would be serving another model.",
        "Check that config.json belongs to these weights. If it does, this variant of the architecture is "
        "not supported yet.",
    ),
    "E0218": Entry(
        "a layer asks something of its input",
        "The checkpoint stores a multiplier, a scale or a norm for the input of a linear layer, and lowbit "
        "does not apply that yet. Leaving it out would give wrong results.",
        "Use another quantization of the same model.",
    ),
    "E0240": Entry(
        "the model brings its own code",
        "config.json names Python code (auto_map) for an architecture that is not built in. lowbit never "
        "runs code from a model, whoever made it.",
        "lowbit models lists the architectures. There may be a version of the model that uses one of them.",
    ),
    "E0241": Entry(
        "unknown architecture",
        "The architecture named in config.json or in the GGUF metadata is not built in.",
        "lowbit models lists the architectures that are.",
    ),
    "E0242": Entry(
        "unsupported variant of an architecture",
        "The architecture is built in, but this model sets something in its config that is not: a kind of "
        "rotary scaling, an activation function.",
        "The message lists what is supported. Use another model of the family.",
    ),
    "E0300": Entry(
        "the operating system refused",
        "A file or folder could not be opened, read or written; the message gives the system's own words.",
        "Check that the path exists and that you may read or write it.",
    ),
    "E0410": Entry(
        "no kernel",
        "Every linear kernel refused a weight; the message has each one's reason.",
        "lowbit inspect MODEL shows the reasons for all weights. Another --device may serve it.",
    ),
    "E0412": Entry(
        "no such device",
        "--device cuda, but PyTorch finds no usable NVIDIA GPU: none is there, the driver is too old, or the "
        "installed PyTorch is a CPU build.",
        "Use --device cpu, or install a CUDA build of PyTorch and check that nvidia-smi lists the GPU.",
    ),
    "E0420": Entry(
        "no attention kernel",
        "Every attention kernel refused the model's KV cache; the message has each one's reason.",
        "Try another --kv-cache-dtype.",
    ),
    "E0500": Entry(
        "out of memory",
        "The operating system gave no more memory.",
        "Close other programs; use a smaller model, --context-length or --mem-fraction-static.",
    ),
    "E0700": Entry(
        "unexpected error",
        "Something happened that the author of the code did not foresee.",
        _REPORT,
    ),
    "E0701": Entry(
        "unknown number format inside lowbit",
        "A reader or kernel asked for a number format that is not in the table, or for a table of values of "
        "a format that has none.",
        _REPORT,
    ),
    "E0702": Entry(
        "a weight cannot be cut there",
        "Rows of a weight were to be taken or moved inside a block that shares one scale.",
        _REPORT,
    ),
    "E0703": Entry(
        "a batch that does not fit its cache",
        "Lengths, page numbers, write slots or positions of a step contradict each other or the KV cache. A "
        "kernel refuses them before it touches memory.",
        _REPORT,
    ),
}
