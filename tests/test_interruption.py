"""Ctrl-C before a run has begun, and the launcher of several processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from forked import run_script

import ddpm_faces
from ddpm_faces.cli import train as cli


SCRIPT = Path(__file__).parents[1] / "training" / "train.py"
COMMAND = "from ddpm_faces.cli import main; main()"
# A module that is interrupted during its import, and makes another error of it, as numpy and others may.
SLOW = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
except BaseException as error:
    raise ImportError("lost") from error
"""


@pytest.mark.parametrize(
    ("arguments", "module"),
    [
        (["-c", COMMAND, "train"], "typer"),
        (["-c", COMMAND, "generate", "model"], "torch"),
        ([str(SCRIPT)], "torch"),
        (["-m", "ddpm_faces.training.launch", "train.py"], "accelerate"),
    ],
)
def test_interrupted_import_exits_with_130(tmp_path, arguments, module):
    (tmp_path / module).mkdir()
    (tmp_path / module / "__init__.py").write_text(SLOW)
    source = str(Path(ddpm_faces.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), source])}
    result = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "Interrupted.\n")


def run(path: Path, code: str, *arguments: str) -> subprocess.CompletedProcess:
    path.write_text(code)
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "HF_HOME": str(path.parent)}
    (result,) = run_script([str(path), *arguments], environment)
    return result


def test_interrupted_setup_exits_with_130(tmp_path):
    """The run cleans up its folder."""
    code = f"""
import os, runpy, signal
import ddpm_faces.training.data as data
data.load_training_data = lambda *args: os.kill(os.getpid(), signal.SIGINT)
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
    result = run(tmp_path / "interrupted.py", code, "--output_dir", str(tmp_path / "run"))
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "Interrupted.\n")
    assert not (tmp_path / "run").exists()


LAUNCH = "import sys\nfrom ddpm_faces.training.launch import main\nsys.exit(main())"
ONE = ["--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
TWO = [*ONE, "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
TWO.remove("--cpu")


@pytest.mark.parametrize("options", [ONE, TWO], ids=["one", "two"])
@pytest.mark.parametrize(
    ("code", "exit_code", "says"),
    [
        ("import sys; sys.exit(75)", 75, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 137, "was killed by SIGKILL.\n"),
    ],
)
def test_launcher_returns_the_exit_code_of_the_script(tmp_path, options, code, exit_code, says):
    (tmp_path / "script.py").write_text(code)
    result = run(tmp_path / "launch.py", LAUNCH, *options, str(tmp_path / "script.py"))
    assert (result.returncode, result.stdout) == (exit_code, ""), result.stderr
    assert (result.stderr.endswith(says), len(result.stderr.splitlines())) == (True, bool(says)), result.stderr


@pytest.mark.parametrize(("options", "exit_code", "says"), [(ONE, 75, ""), (TWO, 130, "Interrupted.\n")])
def test_launcher_lets_an_interrupted_script_save(tmp_path, options, exit_code, says):
    code = f"""
import os, re, signal, sys
from pathlib import Path
if os.environ.get("RANK", "0") == "0":
    signal.signal(signal.SIGINT, lambda *_: None)
    os.kill(os.getppid(), signal.SIGINT)
    status = Path("/proc", str(os.getppid()), "status")  # there until the launcher has received it
    while status.exists() and int(re.search(r"ShdPnd:\\s*(\\w+)", status.read_text())[1], 16) & 2:
        pass
    open({str(tmp_path / "saved")!r}, "w").close()
    sys.exit(75)
signal.pause()
"""
    (tmp_path / "script.py").write_text(code)
    result = run(tmp_path / "launch.py", LAUNCH, *options, str(tmp_path / "script.py"))
    assert (result.returncode, result.stdout) == (exit_code, ""), result.stderr
    if options is ONE:
        assert result.stderr == says
    else:  # the script that waits has no handler
        assert result.stderr.splitlines()[-1] == says.strip()
    assert (tmp_path / "saved").exists()


def test_launcher_reports_its_own_errors_in_one_line(tmp_path):
    result = run(tmp_path / "launch.py", LAUNCH, "--multi_gpu", "--cpu", "script.py")
    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (2, "", 1), result.stderr
    assert result.stderr.startswith("error: `accelerate launch`: You can only use one of")


def test_launcher_on_windows_waits_for_an_interrupted_run(tmp_path, monkeypatch):
    """On Windows, a process cannot replace another one."""
    code = "import os, signal, sys; os.kill(os.getppid(), signal.SIGINT); sys.exit(75)"
    (tmp_path / "train.py").write_text(code)
    monkeypatch.setattr(cli, "os", SimpleNamespace(name="nt"))
    monkeypatch.setattr(cli, "launcher", lambda num_processes: [])
    monkeypatch.setattr("ddpm_faces.training.arguments.training_folder", lambda: tmp_path)
    monkeypatch.setattr("ddpm_faces.training.arguments.parse_training_config", lambda *args: None)
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises((cli.typer.Exit, KeyboardInterrupt)) as raised:
            cli.train(SimpleNamespace(args=[]))
    finally:
        signal.signal(signal.SIGINT, before)
    assert getattr(raised.value, "exit_code", None) == 75


@pytest.mark.parametrize(
    ("settings", "num_processes", "expected"),
    [
        ("distributed_type: 'NO'", 2, ["--multi_gpu", "--num_processes", "2"]),
        ("distributed_type: MULTI_CPU", 3, ["--multi_gpu", "--num_processes", "3"]),
        ("use_cpu: true", 2, ["--multi_gpu", "--num_processes", "2"]),
        ("distributed_type: 'NO'", 1, ["--num_processes", "1"]),
        ("distributed_type: MULTI_GPU", 2, ["--num_processes", "2"]),
        ("distributed_type: FSDP", 2, ["--num_processes", "2"]),
        ("distributed_type: FSDP", None, []),
        (None, 2, ["--multi_gpu", "--num_processes", "2"]),
        (None, 1, None),
    ],
)
def test_launcher_starts_the_requested_number_of_processes(tmp_path, monkeypatch, settings, num_processes, expected):
    path = tmp_path / "default_config.yaml"
    if settings is not None:
        path.write_text(settings)
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(path))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "")
    arguments = cli.launcher(num_processes)
    if expected is None:
        assert arguments == []
        return
    assert arguments[: len(expected) + 2] == ["-m", "ddpm_faces.training.launch", *expected]
    assert ("--mixed_precision" in arguments) == (settings is None)
    assert (os.environ["ACCELERATE_USE_CPU"] == "true") == ("--multi_gpu" in arguments)


@pytest.mark.parametrize(("num_gpus", "says"), [(0, "CPU cores, 3"), (2, "GPUs, 2")])
def test_too_many_processes_are_refused(tmp_path, monkeypatch, num_gpus, says):
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(tmp_path / "none"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: num_gpus)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    with pytest.raises(ValueError, match=f"`num_processes` must be at most the number of {says}, got 4"):
        cli.launcher(4)


def test_unreadable_accelerate_settings_are_reported(tmp_path, monkeypatch):
    path = tmp_path / "default_config.yaml"
    path.write_text("a: 1\nb: [")
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(path))
    with pytest.raises(ValueError, match=r"default_config.yaml, line 2, is not valid YAML: expected the node content"):
        cli.launcher(None)
