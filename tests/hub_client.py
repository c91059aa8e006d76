"""Clients of the Hub in separate processes, cheap enough for tests.

A process imports torch, diffusers and, if requested, this package once. Each piece of code then runs in a fork of it,
with an empty cache and its own token.
"""

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import ddpm_faces


_RUNNER = r"""
import importlib.util, json, os, shutil, signal, sys, tempfile, time, traceback

package = json.loads(sys.argv[1])
import diffusers, huggingface_hub, torch
from diffusers import AutoModel, DDPMPipeline, DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler
import diffusers.utils.dynamic_modules_utils as dynamic_modules
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.utils import logging as hub_logging

assert (importlib.util.find_spec("ddpm_faces.hub") is not None if package else True) is True
if package:
    from ddpm_faces import DDPMFacesPipeline, DDPMFacesScheduler, DDPMFacesUNet, hub
    # Import what commands and trainings need, except `datasets`, which reads the location of its cache on import.
    import accelerate.tracking, matplotlib.pyplot, torch.utils.tensorboard
    import ddpm_faces.cli.app, ddpm_faces.hub.model_folder, ddpm_faces.training.finish
    assert "datasets" not in sys.modules
    from PIL import Image
    from typer.main import get_command
    Image.init()
    get_command(ddpm_faces.cli.app.app).commands["generate"].make_context("generate", ["model"])
else:
    try:
        import ddpm_faces.hub
    except ModuleNotFoundError:
        pass
    else:
        sys.exit("the package is here")
torch.set_num_threads(1)

def picture(pipeline, steps=3):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(1, num_inference_steps=steps, generator=generator, output_type="pt").images.float()

def run(case, home):
    constants.HF_HOME = os.environ["HF_HOME"] = home  # for what is imported here, such as datasets
    constants.HF_HUB_CACHE = os.path.join(home, "hub")
    dynamic_modules.HF_MODULES_CACHE = os.path.join(home, "modules")
    constants.HF_TOKEN_PATH = os.path.join(home, "token")
    constants.HF_HUB_OFFLINE = case["offline"]
    os.environ.pop("HF_TOKEN", None)
    if case["token"]:
        os.environ["HF_TOKEN"] = case["token"]
    if package and not case["is_checked"]:
        ddpm_faces.hub.model_folder.check = lambda folder: None
    waited = []
    time.sleep = waited.append  # what waits for a server that a test has broken does not have to
    names = {**globals(), **case["values"]}
    answer = {"value": None, "error": None, "kind": None}
    try:
        exec(case["code"], names)
        answer["value"] = names.get("result")
    except BaseException as error:
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        answer |= {"error": str(error), "kind": type(error).__name__}
    return answer | {"waited": [seconds for seconds in waited if seconds >= 0.5]}

print("ready", flush=True)
for line in sys.stdin:
    case = json.loads(line)
    pid = os.fork()
    if not pid:
        with open(case["output"], "w", buffering=1) as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            answer = json.dumps(run(case, case["home"]), default=str)
            with open(case["answer"], "w") as file:
                file.write(answer)
        os._exit(0)
    print(pid, flush=True)
    status = os.waitpid(pid, 0)[1]
    print(status, flush=True)
"""


@dataclass
class Outcome:
    """The outcome of a piece of code: `result` or the error, its output, and the time that it would have waited."""

    value: object = None
    error: str | None = None
    kind: str | None = None
    output: str = ""
    waited: list[float] = field(default_factory=list)
    killed: bool = False


class HubClient:
    """Runs code against a [`HubServer`].

    Args:
        server ([`HubServer`]): The Hub to use.
        package (`bool`, defaults to `True`): Whether this package can be imported.
    """

    def __init__(self, server, package: bool = True) -> None:
        self.pid = None
        self._secrets = list(server.users)
        self._folder = tempfile.TemporaryDirectory(prefix="ddpm-faces-client-")
        environment = server.environment(Path(self._folder.name, "home"))
        command = [sys.executable, "-c", _RUNNER, json.dumps(package)]
        if package:  # the one under test
            environment["PYTHONPATH"] = str(Path(ddpm_faces.__file__).parents[1])
        else:
            # Without `site`, an editable installation is not found; all others are.
            command.insert(1, "-S")
            environment["PYTHONPATH"] = sysconfig.get_path("purelib")
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=self._folder.name
        )
        self._count = 0

    def __enter__(self) -> "HubClient":
        return self

    def __exit__(self, *exception) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._folder.cleanup()

    def new_home(self) -> Path:
        """Create an empty cache that several pieces of code can share."""
        return Path(tempfile.mkdtemp(dir=self._folder.name))

    def run(
        self,
        code: str,
        token: str | None = None,
        home: str | os.PathLike | None = None,
        offline: bool = False,
        is_checked: bool = False,
        **values,
    ) -> Outcome:
        """Run `code` in a new process. Pass the `home` of an earlier one to share its cache.

        With `is_checked`, publishing a model first loads it in another process, as it does for users. That takes
        seconds, so it is off by default.
        """
        self._count += 1
        home = Path(home or Path(self._folder.name, str(self._count)))
        home.mkdir(parents=True, exist_ok=True)
        case = {
            "code": code,
            "token": token,
            "home": str(home),
            "offline": offline,
            "is_checked": is_checked,
            "values": values,
            "output": str(home / "output.txt"),
            "answer": str(home / "answer.json"),
        }
        if self._count == 1:
            assert self._process.stdout.readline() == "ready\n"
        Path(case["answer"]).unlink(missing_ok=True)
        self._process.stdin.write(json.dumps(case) + "\n")
        self._process.stdin.flush()
        self.pid = int(self._process.stdout.readline())
        status = int(self._process.stdout.readline())
        outcome = Outcome(output=Path(case["output"]).read_text(), killed=bool(status))
        if not status:
            vars(outcome).update(json.loads(Path(case["answer"]).read_text()))
        # No token may ever appear in the output.
        assert not any(token in f"{outcome.output} {outcome.error}" for token in self._secrets), outcome
        return outcome
