"""Distillation: what the teacher shows, what the student learns, and how a run resumes."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_unet
from datasets import Dataset
from forked import run_script
from PIL import Image
from safetensors.torch import load_file
from test_prompts import a_prompt_model

from ddpm_faces import DDPMFacesPipeline, DDPMFacesScheduler
from ddpm_faces.pipeline_ddpm_faces import Guidance
from ddpm_faces.training.distillation import (
    DistillationConfig,
    Teacher,
    draw_condition,
    draw_noise,
    finished_pipeline,
    initial_student,
    parse_distillation_config,
    student_preset,
    student_schedules,
)


ROOT = Path(__file__).parents[1]
SCHEDULE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}


def a_teacher(guided: bool = False, num_timesteps: int = 300, **unet) -> DDPMFacesPipeline:
    torch.manual_seed(0)
    pipeline = DDPMFacesPipeline(tiny_unet(**unet), DDPMFacesScheduler(num_timesteps, **SCHEDULE))
    if guided:
        pipeline.set_guide(DDPMFacesPipeline(tiny_unet(**unet), pipeline.scheduler), 1.5)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def launch(*arguments, code: int = 0, faults: dict | None = None) -> str:
    """Run the script in one process, with the faults of tests/faults; return what it prints."""
    command = [sys.executable, ROOT / "training" / "distill.py", *arguments]
    path = os.pathsep.join(map(str, [*([ROOT / "tests" / "faults"] if faults else []), ROOT / "src"]))
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": path, "FAULTS": json.dumps(faults or {})}
    result = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout + result.stderr


# Schedules and targets


def test_schedules_follow_the_grid_of_sfd():
    schedules = student_schedules(DDPMFacesScheduler(**SCHEDULE), [2, 4])
    assert list(schedules) == [4, 2]
    for number, schedule in schedules.items():
        assert len(schedule.timesteps) == len(schedule.told) == len(schedule.sigmas) == number
        roots = [sigma ** (1 / 7) for sigma in [*schedule.sigmas, 0.006]]
        steps = [a - b for a, b in zip(roots[:-1], roots[1:], strict=True)]
        assert max(steps) < 1.15 * min(steps)
    assert schedules[4].told == schedules[4].timesteps
    assert schedules[2].told == [t - 0.25 for t in schedules[2].timesteps]
    assert schedules[4].timesteps[0] == schedules[2].timesteps[0]
    with pytest.raises(ValueError, match=r"`student_steps` \(5\) must be fewer: this model has 6 timesteps"):
        student_schedules(DDPMFacesScheduler(6, **SCHEDULE), [5])


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_targets_are_on_the_probability_flow(scale):
    pipeline = a_teacher(guided=True)
    schedules = student_schedules(pipeline.scheduler, [3])
    noise = draw_noise(0, 0, 4, (3, 16, 16))
    targets = Teacher(pipeline, Guidance(1.0, scale), schedules, steps=16).targets(noise, 3)
    # a reference in 150 steps of DDIM from the same level
    ddim = DDPMFacesScheduler.from_config(pipeline.scheduler.config, algorithm="ddim", clip_sample=False)
    ddim.set_timesteps(timesteps=range(schedules[3].timesteps[0], -1, -1))
    x, found = noise, {}
    for t in ddim.timesteps:
        x = ddim.step(pipeline.predict(x, t, guidance=Guidance(1.0, scale)), t, x).prev_sample
        found[int(t) - 1] = x
    for target, t, sigma in zip(
        targets, [*schedules[3].timesteps[1:], -1], [*schedules[3].sigmas[1:], 0], strict=True
    ):
        expected = found[t].detach() * math.hypot(1, sigma)
        error = (target - expected).abs().mean() / expected.std()
        assert error < 0.02


@pytest.mark.parametrize("num_timesteps", [20, 300])
def test_the_teacher_stops_at_each_level_of_the_student(num_timesteps):
    pipeline = a_teacher(num_timesteps=num_timesteps)
    schedules = student_schedules(pipeline.scheduler, [2, 3])
    teacher = Teacher(pipeline, Guidance(), schedules, steps=8)
    for number, schedule in schedules.items():
        fine, stops = [*teacher.timesteps[number], -1], teacher.stops[number]
        assert fine == sorted(set(fine), reverse=True)
        assert [fine[stop] for stop in stops] == [*schedule.timesteps[1:], -1]
        assert len(teacher.targets(draw_noise(0, 0, 2, (3, 16, 16)), number)) == number


@pytest.mark.parametrize("sigma_min", [0.02, 0.1, 0.9])
def test_the_teacher_ends_where_the_solver_of_its_model_ends(sigma_min):
    pipeline = a_teacher()
    scheduler = DDPMFacesScheduler(300, sigma_min=sigma_min, **SCHEDULE)
    schedules = student_schedules(scheduler, [4])
    teacher = Teacher(pipeline.with_scheduler(scheduler), Guidance(), schedules, steps=4)
    after = teacher.timesteps[4][teacher.stops[4][2] + 1 :]  # the steps after the student's last level
    levels = teacher.solver.sigmas[:-1].flip(0)[after].tolist()
    last = schedules[4].sigmas[-1]
    ratio = min(1.0, sigma_min / last)
    assert levels == pytest.approx([last * ratio ** (i / 4) for i in (1, 2, 3)] if ratio < 1 else [], rel=0.1)


def test_noise_depends_only_on_its_number():
    assert torch.equal(draw_noise(3, 64, 8, (3, 4, 4)), draw_noise(3, 64, 8, (3, 4, 4)))
    assert not torch.equal(draw_noise(3, 64, 8, (3, 4, 4)), draw_noise(3, 72, 8, (3, 4, 4)))


# The finished pipeline


def test_student_samples_by_its_preset_and_travels(client, tmp_path):
    pipeline = a_teacher(guided=True)
    torch.manual_seed(5)
    student = tiny_unet()
    finished = finished_pipeline(pipeline, student, student_schedules(pipeline.scheduler, [2, 3]))
    finished.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    pixels = finished(2, generator=generators, output_type="pt").images
    preset = finished.presets["student"]
    x = torch.stack([torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)])
    entry = preset["tuned_steps"]["3"]
    noisy = x * math.hypot(1, entry["sigmas"][0])
    for t, sigma, following in zip(entry["timesteps"], entry["sigmas"], [*entry["sigmas"][1:], 0.0], strict=True):
        v = student(noisy / math.hypot(1, sigma), t).sample
        x_0 = noisy / (1 + sigma**2) - sigma / math.hypot(1, sigma) * v
        noisy = x_0 + following / sigma * (noisy - x_0)
    torch.testing.assert_close(pixels, (noisy.detach() / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)
    assert finished.num_timesteps == 3

    finished.save_pretrained(tmp_path)
    script = """
generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
result = pipeline(2, generator=generators, output_type="pt").images.tolist()
"""
    for load in ("DDPMFacesPipeline.from_pretrained(folder)",
                 "DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)"):  # fmt: skip
        outcome = client.run(f"pipeline = {load}\n{script}", folder=str(tmp_path))
        assert outcome.value == pixels.tolist(), outcome.output
    with pytest.raises(ValueError, match="must be one of those that the student learned, 2, 3, got 4"):
        finished(preset="student", num_inference_steps=4)
    with pytest.raises(ValueError, match="`autoguidance_scale` must be 1 for the student"):
        finished(preset="student", autoguidance_scale=1.5)
    without = DDPMFacesPipeline.from_pretrained(tmp_path, student=None)
    with pytest.raises(ValueError, match="`preset` 'student' needs the model's `student`, which was not loaded"):
        without()
    # other numbers of steps are those of the teacher
    same = DDPMFacesPipeline(pipeline.unet, pipeline.scheduler, guide=pipeline.guide, autoguidance_scale=1.5)
    five = [one(1, 5, torch.Generator().manual_seed(0), output_type="pt").images for one in (finished, same)]
    assert torch.equal(*five)


# Runs


@pytest.fixture
def folder(tmp_path):
    a_teacher(guided=True).save_pretrained(tmp_path / "teacher")
    (tmp_path / "teacher" / "metrics.json").write_text("{}")
    return tmp_path


OPTIONS = ["--train_batch_size", 8, "--student_steps", 2, 3, "--teacher_steps", 2, "--learning_rate", 1e-3]


def test_interrupted_run_equals_an_uninterrupted_one(folder):
    teacher = ["--teacher", folder / "teacher", *OPTIONS, "--checkpoint_every_images", 16, "--log_every_images", 16]
    said = launch(*teacher, "--output_dir", folder / "whole", "--max_train_images", 48, "--sample_every_images", 32)
    assert "with `guidance_scale` 1 and `autoguidance_scale` 1.5 into 3 and 2 steps" in said
    assert "Its preset student takes 3 steps" in said
    assert (folder / "whole" / "samples" / "0000000032.png").is_file()
    assert (folder / "whole" / "samples.png").is_file()
    assert (folder / "whole" / "metrics.json").is_file()
    launch(*teacher, "--output_dir", folder / "parts", "--max_train_images", 48, "--time_limit_minutes", 1e-4, code=75)
    assert not (folder / "parts" / "model_index.json").exists()
    said = launch(*teacher, "--output_dir", folder / "parts", "--max_train_images", 48)
    assert "Resuming from" in said
    weights = [
        load_file(folder / name / "student" / "diffusion_pytorch_model.safetensors") for name in ("whole", "parts")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    before = load_file(folder / "teacher" / "unet" / "diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(weights[0][name], before[name]) for name in before)
    entries = [json.loads(line) for line in (folder / "whole" / "log.jsonl").read_text().splitlines()]
    assert [entry["images_seen"] for entry in entries] == [16, 32, 48]
    assert set(entries[0]["losses"]) == {"3_steps_1", "3_steps_2", "3_steps_3", "2_steps_1", "2_steps_2"}
    config = yaml.safe_load((folder / "whole" / "distillation_config.yaml").read_text())
    assert config["student_steps"] == [3, 2]

    said = launch("--teacher", folder / "whole", "--output_dir", folder / "again", code=2)
    assert "has a student already: give the model that it was distilled from" in said
    changed = ["--teacher", folder / "teacher", *OPTIONS, "--output_dir", folder / "whole", "--teacher_steps", 3]
    assert "`teacher_steps` must be 2 to resume the run" in launch(*changed, code=2)


def test_two_processes_end_well_and_agree_with_one(folder):
    settings = ["--teacher", folder / "teacher", *OPTIONS, "--max_train_images", 16, "--checkpoint_every_images", 0]
    arguments = [str(ROOT / "training" / "distill.py"), *map(str, settings), "--output_dir"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    for number in (1, 2):
        for result in run_script([*arguments, str(folder / f"by-{number}")], environment, number):
            assert result.returncode == 0, result.stderr
    one, two = (
        load_file(folder / f"by-{number}" / "student" / "diffusion_pytorch_model.safetensors") for number in (1, 2)
    )
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-4, rtol=0)


CAPTIONS = ["a smiling woman with brown hair and glasses", "an older man", "a young woman with a hat"]


@pytest.fixture
def prompted(tmp_path):
    """A teacher of prompts, and a dataset with captions, some of them missing."""
    teacher = a_prompt_model()
    scheduler = DDPMFacesScheduler(300, **SCHEDULE)
    components = {**teacher.components, "scheduler": scheduler}
    DDPMFacesPipeline(**components, guidance_scale=2.0).save_pretrained(tmp_path / "teacher")
    rows = [{"image": Image.new("RGB", (8, 8)), "text": [text, f"{text} again"] if text else []}
            for text in [*CAPTIONS, ""]]  # fmt: skip
    (tmp_path / "data").mkdir()
    Dataset.from_list(rows).to_parquet(tmp_path / "data" / "train.parquet")
    return tmp_path


def test_a_student_of_prompts_learns_them(prompted):
    settings = ["--teacher", prompted / "teacher", *OPTIONS, "--max_train_images", 16, "--checkpoint_every_images", 8,
                "--dataset_name", prompted / "data", "--caption_column", "text"]  # fmt: skip
    arguments = [str(ROOT / "training" / "distill.py"), *map(str, settings), "--output_dir"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    for number in (1, 2):
        for result in run_script([*arguments, str(prompted / f"by-{number}")], environment, number):
            assert result.returncode == 0, result.stderr
            if "Distilling" in result.stdout:
                assert "with `guidance_scale` 2 and `autoguidance_scale` 1 into" in result.stdout
    one, two = (DDPMFacesPipeline.from_pretrained(prompted / f"by-{number}") for number in (1, 2))
    for name, weight in one.student.state_dict().items():
        torch.testing.assert_close(two.student.state_dict()[name], weight, atol=1e-4, rtol=0)
    assert (one.student.text_embedding.weight != one.unet.text_embedding.weight).any()
    assert (one.student.null_text_embed != one.unet.null_text_embed).any()  # some prompts were empty
    one.set_progress_bar_config(disable=True)
    faces = [
        one(generator=torch.Generator().manual_seed(0), output_type="pt", **call).images
        for call in ({}, {"prompt": "a young woman"}, {"prompt": "an older man"})
    ]
    assert all((a - b).abs().max() > 1e-4 for a, b in itertools.combinations(faces, 2))
    with pytest.raises(ValueError, match="`guidance_scale` must be 1 for the student"):
        one("a young woman", guidance_scale=2)


def test_prompts_depend_only_on_the_images_seen():
    pipeline = a_prompt_model()
    asked = []
    pipeline.encode_texts = lambda prompts: asked.append(prompts)
    captions = [[text] for text in CAPTIONS]
    config = DistillationConfig("x", train_batch_size=400)
    for share in (slice(0, 400), slice(0, 200), slice(200, 400)):
        draw_condition(pipeline, captions, config, 800, share)
    whole, first, second = asked
    assert whole == first + second
    assert 20 < whole.count("") < 65  # one in ten
    assert set(CAPTIONS) < set(whole)
    assert "with a hat" in whole  # shortened
    draw_condition(pipeline, captions, config, 1200, slice(0, 400))
    assert asked[-1] != whole


def test_captions_are_given_if_the_teacher_takes_prompts(prompted):
    teacher = ["--teacher", prompted / "teacher", "--output_dir", prompted / "out"]
    said = launch(*teacher, code=2)
    assert "`dataset_name` must be given because `teacher`" in said
    said = launch(*teacher, "--dataset_name", prompted / "data", code=2)
    assert "`caption_column` 'caption' of" in said
    a_teacher().save_pretrained(prompted / "plain")
    said = launch("--teacher", prompted / "plain", "--dataset_name", prompted / "data", code=2)
    assert "`dataset_name` must be None because `teacher`" in said


def test_a_student_is_trained_further(folder):
    distilled = ["--teacher", folder / "teacher", *OPTIONS]
    launch(*distilled, "--output_dir", folder / "first", "--max_train_images", 16)
    further = ["--pretrained_student", folder / "first", *OPTIONS, "--learning_rate", 1e-12]
    # The model that has the student can be its teacher, too.
    for teacher in ("teacher", "first"):
        output = folder / f"from-{teacher}"
        launch("--teacher", folder / teacher, *further, "--output_dir", output, "--max_train_images", 8)
        weights = [
            load_file(path / part / "diffusion_pytorch_model.safetensors")
            for path, part in ((folder / "first", "student"), (output, "student"), (folder / "teacher", "unet"))
        ]
        for name in weights[0]:
            torch.testing.assert_close(weights[1][name], weights[0][name], atol=1e-9, rtol=0)
        assert any((weights[1][name] - weights[2][name]).abs().max() > 1e-4 for name in weights[0])
        assert DDPMFacesPipeline.from_pretrained(output).config.default_preset == "student"


def test_a_student_that_does_not_fit_is_refused(folder):
    teacher = a_teacher()
    schedules = student_schedules(teacher.scheduler, [2, 4])
    fitting = finished_pipeline(teacher, tiny_unet(), schedules)
    assert initial_student(teacher, fitting, schedules) is fitting.student
    with pytest.raises(ValueError, match="the model has no student"):
        initial_student(teacher, teacher, schedules)
    with pytest.raises(ValueError, match=r"`student_steps` must be \[2, 4\], which it has learned, got \[4\]"):
        initial_student(teacher, fitting, student_schedules(teacher.scheduler, [4]))
    other = student_schedules(a_teacher(num_timesteps=200).scheduler, [2, 4])
    with pytest.raises(ValueError, match="must start each of 4 steps at the noise levels of this teacher"):
        initial_student(teacher, fitting, other)
    larger = finished_pipeline(teacher, tiny_unet(layers_per_block=2), schedules)
    with pytest.raises(ValueError, match="must have the architecture of the teacher"):
        initial_student(teacher, larger, schedules)
    missing = ["--teacher", folder / "teacher", "--pretrained_student", folder / "nothing"]
    said = launch(*missing, "--output_dir", folder / "out", code=2)
    assert "`pretrained_student`" in said
    assert "nothing" in said
    assert not (folder / "out" / "log.jsonl").exists()


def test_a_full_disk_ends_a_run_only_if_the_checkpoint_is_needed(folder):
    settings = ["--teacher", folder / "teacher", "--student_steps", 2, "--teacher_steps", 2, "--train_batch_size", 16,
                "--max_train_images", 48, "--checkpoint_every_images", 16]  # fmt: skip
    disk_full = {"from": 16, "to": 17, "bytes": 2_000}
    said = launch(*settings, "--output_dir", folder / "out", faults={"disk_full": disk_full})
    assert said.count("The run continues and tries again with the next checkpoint.") == 1
    assert sorted(path.name for path in (folder / "out").glob("checkpoint-*")) == [
        "checkpoint-0000000032",
        "checkpoint-0000000048",
    ]
    assert DDPMFacesPipeline.from_pretrained(folder / "out").student is not None
    disk_full = {"from": 48, "to": 49, "bytes": 2_000}
    said = launch(*settings, "--output_dir", folder / "last", faults={"disk_full": disk_full}, code=1)
    assert "could not be saved" in said


@pytest.mark.slow
def test_student_lands_closer_than_the_teacher_does(folder):
    launch("--teacher", folder / "teacher", "--output_dir", folder / "out", "--student_steps", 2,
           "--max_train_images", 4096, "--train_batch_size", 32, "--learning_rate", 2e-3)  # fmt: skip
    finished = DDPMFacesPipeline.from_pretrained(folder / "out")
    finished.set_progress_bar_config(disable=True)
    calls = ({"num_inference_steps": 100}, {}, {"num_inference_steps": 2})
    exact, ours, teachers = (
        finished(
            16, generator=[torch.Generator().manual_seed(i) for i in range(16)], output_type="latent", **call
        ).images
        for call in calls
    )
    assert (ours - exact).abs().mean() < 0.5 * (teachers - exact).abs().mean()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"student_steps": [9]}, r"`student_steps` must be from 1 to 8, got \[9\]"),
        ({"student_steps": [0]}, r"`student_steps` must be at least 1, got \[0\]"),
        ({"learning_rate": 0.0}, "`learning_rate` must be positive and finite, got 0.0"),
        ({"max_grad_norm": -1.0}, "`max_grad_norm` must be at least 0 and finite, got -1.0"),
        ({"time_limit_minutes": 0.0}, "`time_limit_minutes` must be positive and finite, got 0.0"),
        ({"train_batch_size": 0}, "`train_batch_size` must be at least 1, got 0"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        DistillationConfig(teacher="x", **fields)


def test_configurations_of_training_are_not_offered(capsys):
    with pytest.raises(SystemExit):
        parse_distillation_config(["--help"])
    assert "--config CONFIG A YAML file of fields." in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit):
        parse_distillation_config(["--config", "faces64"])
    assert capsys.readouterr().err == "error: `--config` must be an existing file, got 'faces64'.\n"


def test_a_missing_teacher_is_named(tmp_path):
    assert "`teacher` must be given" in launch("--output_dir", tmp_path / "out", code=2)
    assert "unknown argument --techer; did you mean --teacher?" in launch("--techer", "x", code=2)


def test_student_preset_is_plain(tmp_path):
    preset = student_preset(student_schedules(DDPMFacesScheduler(**SCHEDULE), [1, 4]))
    assert json.loads(json.dumps(preset)) == preset
