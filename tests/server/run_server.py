"""``serve`` over the fake engine as a process: prints its URL, then serves; LowbitErrors end it."""

from __future__ import annotations

import json
import sys

import lowbit.server.app as app
from lowbit.engine.messages import EngineReady
from lowbit.errors import LowbitError
from lowbit.server.limits import Limits
from server.fake_text import load_fake_text
from server.harness import FAKE_ENGINE, QUICK, settings


def main() -> int:
    values = json.loads(sys.argv[1])
    limits = Limits(**{**QUICK.__dict__, **values.pop("limits", {})})
    plain_listen = app.listen

    def announcing_listen(host: str, port: int) -> object:
        sock = plain_listen(host, port)
        print(json.dumps({"url": f"http://127.0.0.1:{sock.getsockname()[1]}"}), flush=True)
        return sock

    def on_ready(ready: EngineReady, url: str) -> None:
        raise OSError(32, "Broken pipe")  # whatever happens to a terminal, the server goes on

    app.listen = announcing_listen
    try:
        return app.serve(
            settings(**values),
            on_ready,
            limits=limits,
            engine_command=FAKE_ENGINE,
            load_text=load_fake_text,
        )
    except LowbitError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
