import inspect
import re
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import yaml

from ddpm_faces import DDPMFacesScheduler, DDPMFacesUNet
from ddpm_faces.config import TrainingConfig, parse_training_config


ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "training" / "configs").glob("*.yaml"))


def test_defaults_are_drawn32():
    assert parse_training_config([]) == TrainingConfig()
    assert parse_training_config(["--config", str(ROOT / "training/configs/drawn32.yaml")]) == TrainingConfig()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_files_make_models(path):
    config = parse_training_config(["--config", str(path)])
    unet = DDPMFacesUNet(**config.unet_config())
    assert unet.config.sample_size == config.resolution
    DDPMFacesScheduler(**config.scheduler_config())


def test_article_file_is_the_article():
    config = parse_training_config(["--config", str(ROOT / "training/configs/article64.yaml")])
    assert DDPMFacesUNet(**config.unet_config()).num_parameters() == 62_438_883
    unet_defaults = {name: p.default for name, p in inspect.signature(DDPMFacesUNet.__init__).parameters.items()}
    ours = {k: tuple(v) if isinstance(v, list) else v for k, v in config.unet_config().items()}
    compared = ours.keys() - {"norm_num_groups"}  # a network of conv blocks has no GroupNorm
    assert {k: ours[k] for k in compared} == {k: unet_defaults[k] for k in compared}
    schedule = DDPMFacesScheduler(clip_sample=False).config
    assert all(schedule[name] == value for name, value in config.scheduler_config().items())
    assert (config.learning_rate, config.train_batch_size, config.adam_weight_decay) == (1e-3, 128, 0)
    assert (config.prediction_type, config.loss_type) == ("epsilon", "l2")


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


def test_saved_configuration_is_a_file_for_config(tmp_path):
    config = TrainingConfig(seed=7, mixed_precision="bf16", random_flip=True, max_train_samples=10, dataset_name="a/b")
    config.save(tmp_path / "config.yaml")
    assert parse_training_config(["--config", str(tmp_path / "config.yaml")]) == config


def test_every_field_is_read():
    """By name in the code of the script, or as an argument of the network or the schedule."""
    arguments = {*inspect.signature(DDPMFacesUNet.__init__).parameters}
    arguments |= {*inspect.signature(DDPMFacesScheduler.__init__).parameters}
    read = set(re.findall(r"config\.(\w+)", (ROOT / "training" / "train.py").read_text()))
    assert {f.name for f in fields(TrainingConfig)} - arguments - read == set()
    assert asdict(TrainingConfig()).keys() - arguments - read == set()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown field learning_rat; did you mean learning_rate?"),
        ("zzzz: 1", "unknown field zzzz; see --help"),
        ("learning_rate: fast", "argument --learning_rate.*: invalid float value: 'fast'"),
        ("loss_type: l3", "argument --loss_type.*: invalid choice: 'l3'"),
        ("seed: null", "`seed` must have a value"),
        ("block_types: []", "`block_types` must be a value or a list of values"),
        ("optimizer: {lr: 1}", "unknown field optimizer"),
        ("- a\n- b", "must hold `field: value` lines"),
        ("a: [", "is not valid YAML"),
        ("train_batch_size: 0", "`train_batch_size` must be at least 1, got 0"),
        ("sample_inference_steps: 400", "must not exceed `num_train_timesteps`"),
        ("learning_rate: 0", "`learning_rate` must be positive"),
        ("adam_beta2: 1.0", r"`adam_beta2` must lie in \[0, 1\)"),
        ("dataset_name: a\ntrain_data_dir: b", "not both"),
    ],
)
def test_bad_file(tmp_path, capsys, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as exit_info:
        parse_training_config(["--config", str(path)])
    assert exit_info.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config", "no_such.yaml"], "existing file, got 'no_such.yaml'"),
        (["--learning_rat", "1"], "unknown argument --learning_rat; did you mean --learning_rate?"),
        (["--loss_type", "l1", "--snr_gamma", "5"], "`loss_type` 'l1' takes no Min-SNR weights: set `snr_gamma` to 0"),
        (["--compile=false"], "unknown argument --compile"),
    ],
)
def test_bad_command_line(capsys, argv, message):
    with pytest.raises(SystemExit):
        parse_training_config(argv)
    assert re.search(message, capsys.readouterr().err)


def test_yaml_of_a_run_holds_all_fields(tmp_path):
    TrainingConfig().save(tmp_path / "config.yaml")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == asdict(TrainingConfig())
