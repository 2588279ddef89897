"""``python -m lowbit.launch_server --model-path M --port 30000``: ``lowbit serve`` by SGLang's name."""

import sys

from lowbit.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
