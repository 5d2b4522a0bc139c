"""Every command in the smoke preset: what it writes, going on after a failure, what it refuses."""

import re
import shutil

import pytest
import torch
from matplotlib import pyplot
from matplotlib.text import Text
from PIL import Image

import eggrpo
import evaluate
import pretrain
import rewards
import runs
import sample
import scenes
import train
from common import UserError
from conftest import ROOT, killed_after, one_line, read_log, run, vary
from tiny_vq import train as tiny_vq_train

FEW = "--prompts 1 --group-size 2 --eval-prompts 2 --eval-every 5"
STAGES = {  # module, its checkpoint, flags that make it short
    "tokenizer": (tiny_vq_train, "tokenizer.pt", "--images 16 --batch 4 --scored 7"),
    "base": (pretrain, "base.pt", "--items 16 --batch 4"),
    "eggrpo": (eggrpo, "eggrpo-0/policy.pt", FEW),
}
PROMPT = "a red circle and a blue square"


def inputs(out, folder):
    """Copy the tokenizer and the base policy of the pipeline. Returns the new output folder."""
    (folder / "smoke").mkdir(parents=True)
    for name in ("tokenizer.pt", "base.pt"):
        shutil.copy(out[0] / "smoke" / name, folder / "smoke" / name)
    return folder


def call(module, folder, flags=""):
    """Call the main() of a command in this process."""
    argv = [PROMPT] if module is sample else []
    module.main([*argv, *flags.split(), "--preset", "smoke", "--out", str(folder)])


@pytest.fixture
def stage(out, tmp_path, request, monkeypatch):
    """A function: folder, flags -> run the stage in a folder that has its inputs. Returns its
    checkpoint, its log without header and seconds, and its pictures."""
    module, path, short = STAGES[request.param]
    monkeypatch.setattr(runs.Run, "PAUSE", 0)  # seconds: save at every step

    def make(name, flags=""):
        folder = tmp_path / name
        if not folder.exists():
            inputs(out, folder)
            (folder / "smoke" / path).unlink(missing_ok=True)
        call(module, folder, f"{short} --steps 5 {flags}")
        checkpoint = folder / "smoke" / path
        records = read_log(folder / "smoke" / path.replace("policy", "log").replace("pt", "jsonl"))
        log = [{k: v for k, v in r.items() if k != "seconds"} for r in records[1:]]
        pictures = {p.name: p.read_bytes() for p in checkpoint.parent.glob("*.[pg][ni][gf]")}
        return torch.load(checkpoint), log, pictures

    return make


def test_train_sh_runs_all_stages_and_writes_all_outputs(out):
    folder, printed = out
    for name in ("results.json", "results.md", "eggrpo-0/gallery-00000.png", "grpo-0/policy.pt"):
        assert (folder / "smoke" / name).stat().st_size > 0, name
    assert Image.open(folder / "smoke" / "before-after.png").width == 830
    assert Image.open(folder / "smoke" / "eggrpo-0" / "training.gif").n_frames == 3  # 0, 2 and 4
    assert "stage 4 of 4: evaluation" in printed
    assert len(re.findall(r"^(?:eg)?grpo: 4 steps; see", printed, re.M)) == 2
    for name in ("base, no plan", "base + plan", "eggrpo-0", "grpo-0"):
        assert f"| {name} (n = 24) |" in printed


def test_finished_stages_are_skipped_with_a_line_that_says_so(out, capsys):
    before = {p: p.stat().st_mtime_ns for p in out[0].rglob("*.pt")}
    for module in (tiny_vq_train, pretrain, eggrpo):
        call(module, out[0])
    assert capsys.readouterr().out.count("finished earlier") == 3
    assert before == {p: p.stat().st_mtime_ns for p in out[0].rglob("*.pt")}


def test_the_log_has_every_key_of_the_table(out):
    """docs/method.md documents each logged key, and nothing that is not logged."""
    log = read_log(out[0] / "smoke" / "eggrpo-0" / "log.jsonl")
    logged = {key for record in log[1:] for key in record}
    page = (ROOT / "docs" / "method.md").read_text()
    rows = page[page.index("| key |") :].split("\n\n")[0].splitlines()[2:]
    documented = {key for row in rows for key in re.findall(r"`([\w/]+)`", row.split("|")[1])}
    assert logged == documented


def test_a_gallery_tells_right_from_wrong_and_leaves_the_users_figures_alone(tmp_path):
    """A notebook's backend and open figures stay; frames of a GIF have one size."""
    pyplot.switch_backend("svg")
    pyplot.figure(7)
    images = torch.rand(2, 3, 30, 30)
    prompts = ["a red circle above a green circle", "one blue circle"]
    pictures = {}
    for exact in ((0, 0), (1, 0), (1, 1)):
        figure = evaluate.gallery([images], prompts, ["EG-GRPO, seed 0"], [torch.tensor(exact)])
        texts = [axis.get_xlabel() for axis in figure.axes]
        assert texts == ["✓" if right else "✗" for right in exact]
        assert all(text.get_fontsize() >= 8 for text in figure.findobj(Text) if text.get_text())
        evaluate.save_figure(figure, tmp_path / "gallery.png")
        pictures[exact] = Image.open(tmp_path / "gallery.png").convert("RGB")
    assert len({picture.size for picture in pictures.values()}) == 1
    assert len({picture.tobytes() for picture in pictures.values()}) == 3
    assert pyplot.get_backend() == "svg" and pyplot.get_fignums() == [7]
    pyplot.close(7)


def test_sample_draws_what_is_typed(out, capsys):
    sample.main(["--preset", "smoke", "--out", str(out[0]), PROMPT])  # call() gives it first
    path = out[0] / "smoke" / "samples" / "a-red-circle-and-a-blue-square.png"
    assert path.exists() and "image:" in capsys.readouterr().out
    call(sample, out[0], "--policy base --no-plan --number 2")
    assert capsys.readouterr().out.count("(no plan)\n") == 2


def test_any_prompt_becomes_the_name_of_a_file_in_the_folder():
    names = {"A red  circle": "a-red-circle", "../../etc/passwd": "etc-passwd", "\0 🟥": "prompt"}
    for prompt, name in (names | {"a " * 1000: "a-" * 39 + "a"}).items():
        assert sample.file_name(prompt, 0) == f"{name}.png"
        assert sample.file_name(prompt, 7) == f"{name}-7.png"


def test_sample_uses_the_guidance_of_training(out, tmp_path, monkeypatch, no_galleries):
    folder = inputs(out, tmp_path / "out")
    call(eggrpo, folder, "--steps 1 --prompts 1 --group-size 2 --eval-prompts 1 --guidance 3")
    used, sample_images = [], sample.sample_images

    def noted(*arguments, **options):
        used.append(options.get("guidance", 1.0))
        return sample_images(*arguments, **options)

    monkeypatch.setattr(sample, "sample_images", noted)
    for flags in ("", "--guidance 2", "--policy base"):
        call(sample, folder, flags)
    assert used == [3.0, 2.0, 1.0]


def test_the_large_preset_runs_in_every_stage(tmp_path):
    """Its pictures, textures and slots, with less depth and width."""
    for module, flags in (
        (tiny_vq_train, "--images 8 --steps 2 --batch 4 --scored 7"),
        (pretrain, "--items 8 --steps 2 --batch 4 --layers 2 --width 128"),
        (eggrpo, "--steps 1 --prompts 1 --group-size 2 --eval-prompts 1"),
    ):
        module.main(["--preset", "large", "--out", str(tmp_path), *flags.split()])
    assert (tmp_path / "large" / "eggrpo-0" / "training.gif").exists()


@pytest.mark.parametrize("stage", STAGES, indirect=True)
def test_a_killed_run_goes_on_and_ends_as_if_it_never_was(stage, monkeypatch):
    """Killed after step 3 was logged, with the checkpoint of step 2: bit for bit the same weights,
    log and pictures. The caller's random state and thread count are left alone."""
    before = torch.get_rng_state(), torch.get_num_threads()
    whole = stage("whole")
    with killed_after(3, monkeypatch):
        stage("killed")
    again = stage("killed")
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == torch.get_num_threads()
    assert whole[1:] == again[1:] and len(whole[1]) > 1
    weights = whole[0]["model"]
    assert all(torch.equal(weights[name], x) for name, x in again[0]["model"].items())


@pytest.mark.parametrize("stage", STAGES, indirect=True)
def test_a_run_that_diverges_is_stopped(stage, monkeypatch, tmp_path, no_galleries):
    """The first step moves weights to where the second is not finite; what was saved is kept."""
    monkeypatch.setitem(rewards.REWARDS, "vary", vary)
    with pytest.raises(UserError, match=r"step 1: \w+ is (inf|nan): lower --lr"):
        stage("out", "--lr 1e9")
    (path,) = (path for path in tmp_path.rglob("*.pt") if torch.load(path)["step"] == 1)
    assert all(x.isfinite().all() for x in torch.load(path)["model"].values())


@pytest.mark.parametrize("stage", ["eggrpo"], indirect=True)
def test_what_a_notebook_has_set_changes_nothing(stage, no_galleries):
    """Nor is what it has set changed."""
    plain = stage("plain", "--steps 2")
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.device("meta"):
            assert stage("set", "--steps 2")[1:] == plain[1:]
            assert torch.empty(1).is_meta and not torch.is_grad_enabled()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("stage", ["eggrpo"], indirect=True)
def test_evaluating_more_often_changes_no_weight(stage, no_galleries):
    often, seldom = stage("often", "--steps 2 --eval-every 1")[0], stage("seldom", "--steps 2")[0]
    assert all(torch.equal(often["model"][name], x) for name, x in seldom["model"].items())


@pytest.mark.parametrize("stage", ["tokenizer", "eggrpo"], indirect=True)
def test_a_bad_reward_stops_a_run_and_the_mended_one_goes_on(stage, monkeypatch, no_galleries):
    """In one process: main() can be called again after it failed."""
    monkeypatch.setitem(rewards.REWARDS, "mine", lambda images, detections, targets: 1.0)
    with pytest.raises(UserError, match="'mine' in rewards.REWARDS must return"):
        stage("out")
    mend = lambda images, detections, targets: images[:, 0].mean(dim=(1, 2))
    monkeypatch.setitem(rewards.REWARDS, "mine", mend)
    assert stage("out")[0]["step"] == 5


def test_a_run_beside_another_is_the_run_alone(out, tmp_path, no_galleries):
    """Bit for bit, with as many threads."""
    folder = inputs(out, tmp_path / "out")
    call(eggrpo, folder, "--method grpo")
    alone, beside = (read_log(path / "smoke/grpo-0/log.jsonl")[1:] for path in (folder, out[0]))
    for record in alone + beside:
        record.pop("seconds", None)
    assert alone == beside and len(alone) == 5


def test_a_run_that_fails_beside_another_fails_the_command(tmp_path, capsys, monkeypatch):
    """What it says is shown, and the other one ends as it would alone."""
    script = tmp_path / "eggrpo.py"
    script.write_text("import sys; print(f'says {sys.argv[1]}'); sys.exit(2 * int(sys.argv[2]))")
    monkeypatch.setattr(eggrpo, "__file__", str(script))
    with pytest.raises(UserError, match="bad ended with status 2"):
        train.side_by_side({"a": ["one", "0"], "bad": ["two", "1"]}, train.Config(out=tmp_path))
    assert sorted(capsys.readouterr().out.split()) == ["one", "says", "says", "two"]


def test_ctrl_c_ends_both_methods_with_one_line_that_says_how_to_go_on(out, tmp_path):
    folder = inputs(out, tmp_path / "out")
    command = "env", "OMP_NUM_THREADS=2", "bash", "train.sh", "--preset", "smoke", "--out", folder
    printed = run(*command, status=130, interrupt_at=folder / "smoke/grpo-0/log.jsonl")
    assert printed.count("interrupted: the same command goes on from the last checkpoint") == 1
    assert "stage 3" in printed and "stage 4" not in printed


def test_a_missing_stage_names_the_command_that_makes_it(tmp_path, capsys):
    for module in (pretrain, evaluate, eggrpo, sample):
        line = one_line(capsys, 2, call, module, tmp_path)
        assert f"make it by `bash train.sh tiny_vq.train --preset smoke --out {tmp_path}`" in line


@pytest.fixture
def made(out, tmp_path):
    """A copy of the finished pipeline."""
    shutil.copytree(out[0], tmp_path / "out")
    return tmp_path / "out"


def refuse(capsys, made, path, command, modules):
    """Assert that commands refuse `path`, made from other files, and name the remedy."""
    for module in modules:
        line = one_line(capsys, 2, call, module, made)
        assert f"{made}/smoke/{path} was made from other files than those at hand" in line
        assert f"remove it and run `bash train.sh {command} --preset smoke --out {made}`" in line


def test_a_tokenizer_made_again_with_another_seed_is_refused_by_what_was_made_from_it(made, capsys):
    (made / "smoke" / "tokenizer.pt").unlink()
    call(tiny_vq_train, made, "--seed 1 --images 8 --steps 1 --batch 4 --scored 7")
    users = (pretrain, eggrpo, evaluate, sample)
    refuse(capsys, made, "base.pt", "pretrain", users)
    (made / "smoke" / "base.pt").unlink()
    call(pretrain, made, "--items 8 --steps 1 --batch 4")
    refuse(capsys, made, "eggrpo-0/policy.pt", "eggrpo", (evaluate, sample))
    refuse(capsys, made, "eggrpo-0/policy.pt", "eggrpo --method eggrpo --name eggrpo-0", (eggrpo,))


def test_an_edited_world_is_refused_by_what_was_made_from_it(made, capsys, monkeypatch):
    monkeypatch.setattr(scenes, "CAPTION_FAULTS", 0.5)
    users = (tiny_vq_train, pretrain, eggrpo, evaluate, sample)
    refuse(capsys, made, "tokenizer.pt", "tiny_vq.train", users)
