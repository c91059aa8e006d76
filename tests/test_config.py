import ast
import inspect
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import yaml
from diffusers import DPMSolverMultistepScheduler, UNet2DModel

from ddpm_faces import DDPMFacesPipeline, DDPMFacesScheduler, DDPMFacesUNet
from ddpm_faces.training.arguments import parse_training_config
from ddpm_faces.training.config import GROUPS, TrainingConfig


ROOT = Path(__file__).parents[1]
MODEL_ARGUMENTS = {*inspect.signature(DDPMFacesUNet.__init__).parameters}
MODEL_ARGUMENTS |= {*inspect.signature(DDPMFacesScheduler.__init__).parameters}
TRAINING_GROUPS = {name: about for name, about in GROUPS.items() if name != "Distillation"}
CONFIGS = sorted((ROOT / "training" / "configs").glob("*.yaml"))


def test_defaults_are_drawn32():
    assert parse_training_config([]) == TrainingConfig()
    assert parse_training_config(["--config", str(ROOT / "training/configs/drawn32.yaml")]) == TrainingConfig()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_build_models(path):
    config = parse_training_config(["--config", str(path)])
    unet = DDPMFacesUNet(**config.unet_config())
    assert unet.config.sample_size == config.resolution[0]
    DDPMFacesScheduler(**config.scheduler_config())


def test_article_config_reproduces_the_article():
    config = parse_training_config(["--config", str(ROOT / "training/configs/article64.yaml")])
    assert DDPMFacesUNet(**config.unet_config()).num_parameters() == 62_438_883
    unet_defaults = {name: p.default for name, p in inspect.signature(DDPMFacesUNet.__init__).parameters.items()}
    ours = {k: tuple(v) if isinstance(v, list) else v for k, v in config.unet_config().items()}
    unet_defaults["block_types"] = (unet_defaults["block_types"],) * 4  # a single name stands for all levels
    compared = ours.keys() - {"norm_num_groups"}  # conv blocks have no GroupNorm
    assert {k: ours[k] for k in compared} == {k: unet_defaults[k] for k in compared}
    schedule = DDPMFacesScheduler(clip_sample=False).config
    assert all(schedule[name] == value for name, value in config.scheduler_config().items())
    assert (config.learning_rate, config.train_batch_size, config.adam_weight_decay) == (1e-3, 128, 0)
    assert (config.prediction_type, config.loss_type) == ("epsilon", "l2")


def test_learned_variance_doubles_the_output_channels():
    config = TrainingConfig(variance_type="learned_range", in_channels=1)
    assert config.unet_config()["out_channels"] == 2
    assert config.scheduler_config()["variance_type"] == "learned_range"


def test_order_is_defaults_then_file_then_command_line(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "learning_rate: 5e-4\nseed: 3\nblock_out_channels: [8, 16]\nblock_types: [resnet]\nuse_ema: false\n"
    )
    config = parse_training_config(["--seed", "4", "--config", str(path)])
    assert config.learning_rate == 5e-4  # YAML reads 5e-4 as a string
    assert config.seed == 4
    assert config.block_out_channels == [8, 16]
    assert config.use_ema is False
    assert config.train_batch_size == TrainingConfig().train_batch_size


def test_pretrained_pipeline_ranks_between_defaults_and_file(tmp_path):
    unet = DDPMFacesUNet((24, 16), 1, 1, (8, 16), ("conv",), None, "conv", 1, 8, 16, num_class_embeds=3, dropout=0.1)
    scheduler = DPMSolverMultistepScheduler(num_train_timesteps=50, beta_schedule="linear", prediction_type="epsilon")
    DDPMFacesPipeline(unet, scheduler).save_pretrained(tmp_path / "model")
    (tmp_path / "config.yaml").write_text(f"pretrained_model_name_or_path: {tmp_path / 'model'}\ndropout: 0.3\n")
    config = parse_training_config(["--config", str(tmp_path / "config.yaml"), "--time_proj_dim", "4"])
    expected = {
        "resolution": [24, 16], "in_channels": 1, "block_out_channels": [8, 16], "block_types": ["conv"],
        "mid_block_type": "none", "time_embedding_dim": 16, "act_fn": "relu", "num_train_timesteps": 50,
        "beta_schedule": "linear", "prediction_type": "epsilon", "num_class_embeds": None, "learning_rate": 1e-3,
        "dropout": 0.3, "time_proj_dim": 4, "variance_type": "fixed_small", "clip_sample": True,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected


def test_pipelines_that_cannot_be_fine_tuned_are_refused(tmp_path, capsys):
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    unet = UNet2DModel(16, norm_num_groups=4, **blocks)
    DDPMFacesPipeline(unet, DDPMFacesScheduler()).save_pretrained(tmp_path / "other")
    for name, reason in ((tmp_path / "no-such", ""), (tmp_path / "other", "does not know")):
        with pytest.raises(SystemExit):
            parse_training_config(["--pretrained_model_name_or_path", str(name)])
        message = capsys.readouterr().err
        assert f"error: `pretrained_model_name_or_path` '{name}' cannot be fine-tuned: " in message
        assert reason in message


def test_saved_configuration_can_be_passed_to_config(tmp_path):
    config = TrainingConfig(seed=7, mixed_precision="bf16", random_flip=True, max_train_samples=10, dataset_name="a/b")
    config.save(tmp_path / "config.yaml")
    assert parse_training_config(["--config", str(tmp_path / "config.yaml")]) == config


def attributes_read(tree: ast.AST, owner: str) -> set[str]:
    """Return the attribute names that the code reads from `owner` or from any `x.owner`."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", getattr(node.value, "attr", None)) == owner
    }


def test_every_field_is_read():
    """The training or a method of the configuration reads each field, or the network or the scheduler takes it."""
    read = set(MODEL_ARGUMENTS)
    for path in (ROOT / "training" / "train.py", *(ROOT / "src" / "ddpm_faces" / "training").glob("*.py")):
        if path.name != "config.py":
            read |= attributes_read(ast.parse(path.read_text()), "config")
    for method in ast.parse(inspect.getsource(TrainingConfig)).body[0].body:
        # Checking a field, as `__post_init__` and `_check_data` do, does not count as using it.
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
            read |= attributes_read(method, "self")
    assert {f.name for f in fields(TrainingConfig)} - read == set()


def test_every_field_is_documented():
    for f in fields(TrainingConfig):
        assert f.metadata["group"] in GROUPS
        assert re.fullmatch(r"\S.*\.", f.metadata["help"]), f.name
    in_order = list(dict.fromkeys(f.metadata["group"] for f in fields(TrainingConfig)))
    assert in_order == list(TRAINING_GROUPS)


@pytest.mark.parametrize("columns", [80, 120])
def test_help_is_grouped_and_fits_the_terminal(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as exit_info:
        parse_training_config(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= columns
    # Each flag is listed exactly once, without `--no-flag` or `--with_underscores` variants.
    names = [f.name.replace("_", "-") for f in fields(TrainingConfig)]
    assert re.findall(r"(?<!\S)--[\w-]+", text) == [f"--{name}" for name in ("help", "config", *names)]
    assert re.findall(r"^(\w+):$", text, re.MULTILINE) == ["options", *TRAINING_GROUPS]
    assert all(about in " ".join(text.split()) for about in TRAINING_GROUPS.values())


def test_help_shows_defaults_and_choices(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parse_training_config(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    parts = re.split(r" --(?=[\w-]+ )", text)
    of_flag = {part.split()[0].replace("-", "_"): part for part in parts}
    for f in fields(TrainingConfig):
        default = getattr(TrainingConfig(), f.name)
        assert of_flag[f.name].count("(default: ") == (default is not None or "(default" in f.metadata["help"]), f.name
    assert "{constant,linear,cosine}" in of_flag["lr_scheduler"]
    for flag, default in {
        "use_ema": "true", "block_out_channels": "32 64 128", "snr_gamma": "inf", "adam_epsilon": "1e-08",
        "output_dir": "ddpm-faces-model", "lr_warmup_images": "2000",
    }.items():  # fmt: skip
        assert f"(default: {default})." in of_flag[flag]


def test_flags_that_are_true_or_false():
    assert parse_training_config(["--random_flip"]).random_flip is True
    assert parse_training_config(["--use_ema", "false"]).use_ema is False
    assert parse_training_config(["--use_ema=true"]).use_ema is True
    assert parse_training_config(["--random_flip", "true", "--streaming", "False"]).random_flip is True


def test_args_file_beside_the_script_is_ignored(tmp_path, monkeypatch):
    """HfArgumentParser would read a `train.args` file without leaving a trace in the log or the saved files."""
    (tmp_path / "train.args").write_text("--seed 5")
    monkeypatch.setattr("sys.argv", [str(tmp_path / "train.py")])
    assert parse_training_config() == TrainingConfig()


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("mixed_precision: no", "mixed_precision", "no"),  # YAML reads `no` as false
        ("use_ema: no", "use_ema", False),
        ("random_flip: true", "random_flip", True),
        ("learning_rate: 1e-3", "learning_rate", 1e-3),
        ("snr_gamma: .inf", "snr_gamma", float("inf")),
        ("resolution: 48", "resolution", [48]),
        ("resolution: [48, 64]", "resolution", [48, 64]),
        ("cache_dir:", "cache_dir", None),
        ("cache_dir: a b", "cache_dir", "a b"),
        ("output_dir: -x", "output_dir", "-x"),
        ("output_dir: 2024-01-01", "output_dir", "2024-01-01"),
        ("report_to: none", "report_to", "none"),
    ],
)
def test_values_in_a_yaml_file(tmp_path, text, name, value):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert getattr(parse_training_config(["--config", str(path)]), name) == value


# Learning rate and EMA over the run


def test_learning_rate_depends_on_images_not_on_batches():
    for batch_size in (8, 32, 128):
        config = TrainingConfig(train_batch_size=batch_size, lr_warmup_images=1024, max_train_images=4096)
        rates = [config.learning_rate_at(images) for images in (0, 256, 1024, 2560, 4096, 9999)]
        assert rates == pytest.approx([0, 2.5e-4, 1e-3, 5e-4, 0, 0], abs=1e-12)


@pytest.mark.parametrize(("name", "end"), [("constant", 1e-3), ("linear", 0.0), ("cosine", 0.0)])
def test_learning_rate_without_warmup(name, end):
    config = TrainingConfig(lr_scheduler=name, lr_warmup_images=0, max_train_images=320)
    assert config.learning_rate_at(0) == 1e-3
    assert config.learning_rate_at(160) == pytest.approx((1e-3 + end) / 2)
    assert config.learning_rate_at(320) == pytest.approx(end, abs=1e-12)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_learning_rate_ends_at_0_with_the_last_step(name):
    """With steps of 48 images, the last step of a run of 1000 images ends at 1008."""
    config = TrainingConfig(lr_scheduler=name, train_batch_size=48, max_train_images=1000, lr_warmup_images=0)
    assert config.max_train_steps == 21
    assert config.learning_rate_at(1000) > 0
    assert config.learning_rate_at(1008) == pytest.approx(0, abs=1e-12)


def test_warmup_longer_than_the_run():
    config = TrainingConfig(lr_warmup_images=1000, max_train_images=320)
    assert config.learning_rate_at(320) == pytest.approx(3.2e-4)
    assert config.learning_rate_at(1000) == pytest.approx(1e-3)
    config = TrainingConfig(lr_warmup_images=320, max_train_images=320)
    assert config.learning_rate_at(320) == pytest.approx(1e-3)


@pytest.mark.parametrize("batch_size", [8, 32, 128])
def test_half_life_of_the_ema(batch_size):
    config = TrainingConfig(train_batch_size=batch_size, ema_half_life_images=1024)
    remaining = 1.0
    for images_seen in range(20_480 + batch_size, 20_480 + 1024 + 1, batch_size):
        remaining *= config.ema_decay_at(images_seen)
    assert remaining == pytest.approx(0.5)
    # During the ramp-up, the half-life is a tenth of the images seen.
    assert config.ema_decay_at(1280) == pytest.approx(0.5 ** (batch_size / 128))
    assert config.ema_decay_at(0) == 0
    assert config.ema_decay_at(10**9) == config.ema_decay_at(20_480)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown field learning_rat; did you mean learning_rate?"),
        ("zzzz: 1", "unknown field zzzz; see --help"),
        ("learning_rate: fast", "argument --learning-rate.*: invalid float value: 'fast'"),
        ("loss_type: l3", "argument --loss-type.*: invalid choice: 'l3'"),
        ("seed: null", "`seed` must have a value"),
        ("block_types: []", "`block_types` must be a value or a list of values"),
        ("optimizer: {lr: 1}", "unknown field optimizer"),
        ("- a\n- b", "must contain `field: value` lines"),
        ("seed: 1\na: [", r"config.yaml, line 2, is not valid YAML: expected the node content"),
        ("a: b: c", "config.yaml, line 1, is not valid YAML: mapping values are not allowed here"),
        ("seed: 1\n\0", "config.yaml, line 2, is not valid YAML: it has a character that is not text"),
        ("seed: 2026-99-99", "config.yaml is not valid YAML: month must be in 1..12"),
        ("[" * 10_000, "config.yaml is not valid YAML: maximum recursion depth exceeded"),
        ("train_batch_size: 0", "`train_batch_size` must be at least 1, got 0"),
        ("sample_inference_steps: 400", "must not exceed `num_train_timesteps`"),
        ("sample_sigma_min: 1", r"`sample_sigma_min` must lie in \(0, 1\), got 1.0"),
        ("learning_rate: 0", "`learning_rate` must be positive"),
        ("learning_rate: -1", "`learning_rate` must be positive and finite, got -1.0"),
        ("learning_rate: .nan", "`learning_rate` must be positive and finite, got nan"),
        ("time_limit_minutes: .inf", "`time_limit_minutes` must be positive and finite"),
        ("seed: -1", "`seed` must be at least 0, got -1"),
        ("augment_probability: 1.5", r"`augment_probability` must lie in \[0, 1\], got 1.5"),
        ("augment_probability: 0.1\nrandom_flip: true", "leave `random_flip` out"),
        ("resolution: [1, 2, 3]", "`resolution` must be one side or a height and a width"),
        ("streaming: true", "`streaming` needs a `dataset_name`"),
        ("streaming: true\ndataset_name: a", "name a `validation_split`, or set `num_validation_images` to 0"),
        ("streaming: true\ndataset_name: a\nlabel_column: b", "needs `num_class_embeds`"),
        (
            "streaming: true\ndataset_name: a\nmax_train_samples: 9",
            "`max_train_samples` cannot be combined with `streaming`",
        ),
        ("validation_split: test", "`validation_split` 'test' needs a `dataset_name`"),
        ("num_class_embeds: 3", "needs a `label_column`"),
        ("push_to_hub: true\nhub_license: Apache 2", "`hub_license` must be a license identifier of the Hub"),
        ("early_stopping_patience: 2\nnum_validation_images: 0", "`early_stopping_patience` needs"),
        ("guide_images: 100", r"`guide_images` \(100\) needs an `autoguidance_scale` above 1"),
        ("autoguidance_scale: 1.5\nguide_images: 40000", r"`guide_images` \(40000\) must be below `max_train_images`"),
        ("autoguidance_scale: 0", r"`autoguidance_scale` must be at least 1 \(no guide\) and finite, got 0.0"),
        ("autoguidance_scale: .nan", r"`autoguidance_scale` must be at least 1 \(no guide\) and finite, got nan"),
        ("stop_on_copies: true", "`stop_on_copies` needs `audit_every_images` and `checkpoint_every_images` above 0"),
        ("audit_every_images: 8", "`audit_every_images` needs `num_validation_images` of at least 100, got 64"),
        (
            "audit_every_images: 8\nnum_evaluation_samples: 99",
            "`audit_every_images` needs `num_evaluation_samples` of at least 100, got 99",
        ),
        ("audit_every_images: 8\nnum_validation_images: 100\nin_channels: 1", "it needs `in_channels` 3"),
        ("audit_every_images: 8\nnum_validation_images: 100\ncrop: random", "`crop` center"),
        ("evaluate_every_images: 8\nnum_validation_images: 19", "`num_validation_images` of at least 20, got 19"),
        ("evaluate_every_images: 8\nin_channels: 4", "`evaluate_every_images` needs `in_channels` of 1 or 3, got 4"),
        ("crop: left", "argument --crop.*: invalid choice: 'left'"),
        ("adam_beta2: 1.0", r"`adam_beta2` must lie in \[0, 1\)"),
        ("dataset_name: a\ntrain_data_dir: b", "not both"),
        ("learning_rate: [1, 2]", r"`learning_rate` must be a single value, got \[1, 2\]"),
        ("block_types: [conv, -a]", "`block_types` must not contain values that begin with a dash"),
        ("block_types: [conv, null]", "`block_types` must be a value or a list of values"),
        ("resolution: [-1, 5]", r"`resolution` must be at least 1, got \[-1, 5\]"),
        ('cache_dir: ""', "`cache_dir` must not be blank, got ''"),
        ("seed: 2147483648", "`seed` must be at most 2147483647, got 2147483648"),
        ("image_column: face", "`image_column` 'face' needs a `dataset_name`"),
        ("dataset_name: a\nvalidation_split: train", "`validation_split` 'train' must differ from the training split"),
        ("dropout: 1", r"`dropout` must lie in \[0, 1\), got 1.0"),
        ("beta_start: .nan", r"`beta_start` must lie in \(0, 1\), got nan"),
        ("max_grad_norm: .inf", "`max_grad_norm` must be at least 0 and finite, got inf"),
        ("snr_gamma: .nan", "`snr_gamma` must be at least 0"),
        ("snr_gamma: 5\nsnr_floor: 6", r"`snr_floor` must be 0, or at most `snr_gamma` \(5\) and finite, got 6.0"),
        ("snr_floor: .inf", "`snr_floor` must be 0, or at most `snr_gamma`"),
        ("snr_floor: 1\nprediction_type: epsilon", r"`snr_floor` \(1.0\) needs the `prediction_type` v_prediction"),
        ("num_train_timesteps: 0", "`num_train_timesteps` must be at least 1, got 0"),
        ("checkpoints_total_limit: 0", "`checkpoints_total_limit` must be at least 1, got 0"),
        ("in_channels: 2", "argument --in-channels.*: invalid choice: 2"),
        ("use_ema: maybe", "argument --use-ema.*: .*got maybe"),
    ],
)
def test_bad_file(tmp_path, capsys, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as exit_info:
        parse_training_config(["--config", str(path)])
    assert exit_info.value.code == 2
    told = capsys.readouterr().err
    assert re.search(message, told)
    assert len(told.splitlines()) == 1


def test_file_in_another_encoding(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("output_dir: café", "latin-1")
    with pytest.raises(SystemExit) as exit_info:
        parse_training_config(["--config", str(tmp_path / "config.yaml")])
    assert exit_info.value.code == 2
    says = f"error: {tmp_path / 'config.yaml'} must be saved as UTF-8: it has an unexpected end of data at byte 15.\n"
    assert capsys.readouterr().err == says


INTEGERS = [name for name, hint in get_type_hints(TrainingConfig).items() if int in (hint, *get_args(hint))]
INTEGERS += ["resolution", "block_out_channels"]


@pytest.mark.parametrize("value", [10**20, 2**53 + 1])
@pytest.mark.parametrize("name", INTEGERS)
def test_integers_that_overflow(capsys, name, value):
    with pytest.raises(SystemExit) as exit_info:
        parse_training_config([f"--{name}", str(value)])
    assert exit_info.value.code == 2
    told = capsys.readouterr().err
    assert re.fullmatch(rf"error: `{name}` must be at most \d+, got \[?{value}\]?\.\n", told)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config", "no_such.yaml"], "existing file, got 'no_such.yaml'"),
        (["--learning_rat", "1"], "unknown argument --learning-rat; did you mean --learning-rate?"),
        (
            ["--loss_type", "l1", "--snr_gamma", "5"],
            "`loss_type` 'l1' cannot be combined with Min-SNR weights: set `snr_gamma` to 0",
        ),
        (["--compile=false"], "unknown argument --compile"),
        (["--config"], "argument --config: expected one argument"),
        (["--resolution", "wide"], "argument --resolution: invalid int value: 'wide'"),
        (["--pretrained_model_name_or_path"], "argument --pretrained-model-name-or-path: expected one argument"),
    ],
)
def test_bad_command_line(capsys, argv, message):
    with pytest.raises(SystemExit) as exit_info:
        parse_training_config(argv)
    assert exit_info.value.code == 2
    told = capsys.readouterr().err
    assert re.search(message, told)
    assert len(told.splitlines()) == 1


HINTS = get_type_hints(TrainingConfig)


@pytest.mark.parametrize("name", [name for name, hint in HINTS.items() if "Literal" in str(hint)])
def test_choices_are_checked_in_python_too(name):
    with pytest.raises(ValueError, match=f"`{name}` must be one of .*, got 'cosin'"):
        TrainingConfig(**{name: "cosin"})


@pytest.mark.parametrize("name", [name for name, hint in HINTS.items() if "Literal" not in str(hint)])
def test_types_are_checked_in_python_too(name):
    """A string is refused for a number or a bool, a number for a string, and a single value for a list."""
    wrong = 3 if "str" in str(HINTS[name]) or "list" in str(HINTS[name]) else "false"
    with pytest.raises(ValueError, match=f"`{name}` must be .*, got {wrong!r}"):
        TrainingConfig(**{name: wrong})


@pytest.mark.parametrize(("name", "value"), [("seed", True), ("seed", 1.5), ("resolution", [32, 1.5]), ("seed", None)])
def test_types_are_exact(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be (int|list.int.), got {re.escape(repr(value))}"):
        TrainingConfig(**{name: value})


def test_float_fields_accept_integers():
    assert TrainingConfig(learning_rate=1, dropout=0, time_limit_minutes=5).learning_rate == 1


@pytest.mark.parametrize(
    "name", [name for name, hint in HINTS.items() if float in (hint, *get_args(hint)) and name != "snr_gamma"]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_floats_are_finite_and_not_negative(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must .*, got {value}"):
        TrainingConfig(**{name: value})


@pytest.mark.parametrize(
    "name", [n for n, hint in HINTS.items() if get_origin(hint) is Literal and n in MODEL_ARGUMENTS]
)
def test_models_accept_every_choice(name):
    """Every choice that the configuration offers builds a model."""
    for value in get_args(HINTS[name]):
        config = TrainingConfig(**{name: value})
        DDPMFacesUNet(**config.unet_config())
        DDPMFacesScheduler(**config.scheduler_config())


def test_saved_yaml_holds_all_fields(tmp_path):
    TrainingConfig().save(tmp_path / "config.yaml")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == asdict(TrainingConfig())


def test_tilde_in_output_dir_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert TrainingConfig(output_dir="~/model").output_dir == "/home/somebody/model"


def test_resolution_must_be_divisible_by_the_number_of_levels():
    with pytest.raises(ValueError, match=r"`resolution` must be a multiple of 4 .*, got \[50\]"):
        TrainingConfig(resolution=[50])


def test_flags_accept_hyphens_for_underscores():
    config = parse_training_config(["--output-dir=my-model", "--learning-rate", "1e-4", "--random-flip"])
    assert (config.output_dir, config.learning_rate, config.random_flip) == ("my-model", 1e-4, True)


def test_solver_of_the_finished_pipeline_ends_as_the_sample_grids_do():
    assert TrainingConfig(sample_sigma_min=0.1).scheduler_config()["sigma_min"] == 0.1
