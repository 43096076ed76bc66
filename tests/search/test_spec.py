"""search.spec: what a job file may say, and how an error names the key."""

import json

import pytest

from samplers.errors import InputError
from samplers.sampling import DDPM, EDM
from search.spec import from_dict, load, parse

GOOD = {
    "model": {"name": "m", "format": "ideal"},
    "dataset": {"name": "d", "reference": "digits"},
    "features": "digits",
    "sampling": {"solver": "ddpm", "nfe": 20},
}


def changed(**sections):
    return {**GOOD, **sections}


def test_a_minimal_job_gets_the_defaults(tmp_path):
    spec = parse(GOOD, "job.yaml", tmp_path)
    assert spec.sampling == (DDPM("ddpm", 20),)
    assert spec.search.strategy == "adaptive"
    assert spec.search.images == spec.search.confirm_images == 10_000
    assert spec.search.all_rungs == (1000, 2500, 5000, 10_000)
    assert spec.resources.workers == "auto"


def test_a_list_of_nfe_makes_one_sampling_each(tmp_path):
    spec = parse(changed(sampling={"solver": "heun", "nfe": [13, 35], "S_churn": 40}), "job.yaml", tmp_path)
    assert spec.sampling == (EDM("heun", 13, S_churn=40), EDM("heun", 35, S_churn=40))


def test_rungs_end_at_the_number_of_images(tmp_path):
    assert parse(changed(search={"images": 64}), "j", tmp_path).search.all_rungs == (64,)
    assert parse(changed(search={"images": 100, "rungs": [10, 100]}), "j", tmp_path).search.all_rungs == (
        10,
        100,
    )


def test_relative_paths_start_at_the_job_file(tmp_path):
    (tmp_path / "net.pt").touch()
    (tmp_path / "features.ts").touch()
    (tmp_path / "job.yaml").write_text(
        "model: {name: m, format: adm, path: net.pt}\n"
        "dataset: {name: d, reference: images}\n"
        "features: features.ts\n"
        "sampling: {solver: ddpm, nfe: 20}\n"
    )
    spec = load(tmp_path / "job.yaml")
    assert (spec.folder, spec.model.path) == (tmp_path, "net.pt")
    assert spec.dataset.reference == str(tmp_path / "images")
    assert spec.features == str(tmp_path / "features.ts")


def test_the_files_of_analytic_dpm_start_at_the_job_file_too(tmp_path):
    data = {"name": "d", "reference": "digits", "images": "train"}
    sampling = {"solver": "analytic_ddim", "nfe": [5, 9], "ms_eps": "official.ms_eps.pth"}
    spec = parse(changed(dataset=data, sampling=sampling), "j", tmp_path)
    assert spec.dataset.images == str(tmp_path / "train")
    assert {s.ms_eps for s in spec.sampling} == {str(tmp_path / "official.ms_eps.pth")}


def test_metrics_want_images_of_the_confirmation(tmp_path):
    spec = parse(changed(metrics=["kid", "recall"], search={"confirm": 50}), "j", tmp_path)
    assert spec.metrics == ("kid", "recall")
    for keys, message in (
        (
            {"metrics": ["kid"], "search": {"strategy": "paper", "confirm": 0}},
            "measured on search.confirm images, 0 here",
        ),
        ({"metrics": ["kid", "kid"]}, "metrics: each once: kid, kid"),
    ):
        with pytest.raises(InputError, match=message):
            parse(changed(**keys), "j", tmp_path)


def test_bundled_names_are_no_paths(tmp_path):
    spec = parse(GOOD, "j", tmp_path)
    assert (spec.dataset.reference, spec.features) == ("digits", "digits")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"modell": {}}, "job.yaml: modell: unknown key"),
        ({"model": {"name": "m", "format": "ideal", "flags": 1}}, "job.yaml: model.flags: unknown key"),
        ({"model": {"name": "m"}}, "job.yaml: model.format: this key is missing"),
        ({"model": {"name": "", "format": "ideal"}}, "job.yaml: model.name: "),
        ({"sampling": {"solver": "ddpm", "nfe": 20, "eta": 1}}, "job.yaml: sampling.eta: unknown key"),
        (
            {"sampling": {"solver": "ddim", "nfe": 20, "eta": 2}},
            "job.yaml: sampling: eta must lie between 0 .*not 2",
        ),
        ({"sampling": {"solver": "plms", "nfe": 20}}, "job.yaml: sampling.*'plms'"),
        (
            {"sampling": {"solver": "analytic_ddpm", "nfe": 20, "clip_pixel": -1}},
            "job.yaml: sampling.clip_pixel: .*(got -1)",
        ),
        (
            {"sampling": {"solver": "analytic_ddpm", "nfe": 20, "clip": False}},
            "job.yaml: sampling: clip: false needs variance fixed_small",
        ),
        (
            {"sampling": {"solver": "ldm_ddim", "nfe": 20, "clip": True}},
            "job.yaml: sampling.clip: unknown key",
        ),
        ({"sampling": {"nfe": 20}}, "job.yaml: sampling.*solver"),
        ({"sampling": {"solver": "ddpm"}}, "job.yaml: sampling.nfe: this key is missing"),
        ({"sampling": {"solver": "ddpm", "nfe": []}}, "job.yaml: sampling: nfe is empty"),
        ({"sampling": {"solver": "heun", "nfe": 20}}, "job.yaml: sampling: nfe: Heun.*use 19 or 21"),
        ({"search": {"images": 1}}, "job.yaml: search.images: .*(got 1)"),
        ({"search": {"seed": -1}}, "job.yaml: search.seed: .*(got -1)"),
        ({"search": {"strategy": "grid"}}, "job.yaml: search.strategy: .*(got 'grid')"),
        ({"search": {"confirm": 0}}, "job.yaml: search: confirm is 0: adaptive .*strategy: paper"),
        ({"search": {"confirm": 1, "strategy": "paper"}}, "job.yaml: search: confirm is 1: .*at least 2"),
        ({"search": {"strategy": "paper", "budget": 100}}, "job.yaml: search: budget belongs to"),
        (
            {"search": {"strategy": "paper", "parameters": {"eta": [0, 1]}}},
            "job.yaml: search: parameters belongs to",
        ),
        ({"search": {"parameters": {"eta": 1}}}, "job.yaml: search.parameters.eta: "),
        ({"search": {"images": 10, "rungs": [20]}}, "job.yaml: search: rungs must rise"),
        ({"search": {"b": {"coarse": "wide"}}}, "job.yaml: search.b.coarse: .*(got 'wide')"),
        ({"resources": {"workers": 0}}, "job.yaml: resources.workers: .*(got 0)"),
    ],
)
def test_a_mistake_is_named_with_its_key(sections, message, tmp_path):
    with pytest.raises(InputError, match=message):
        parse(changed(**sections), "job.yaml", tmp_path)


def test_every_mistake_is_named_at_once(tmp_path):
    with pytest.raises(InputError) as caught:
        parse(changed(search={"images": 1, "seed": -1}), "job.yaml", tmp_path)
    assert len(str(caught.value).splitlines()) == 2


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match="absent.yaml: the job file cannot be read"):
        load(tmp_path / "absent.yaml")
    (tmp_path / "broken.yaml").write_text("model: {name")
    with pytest.raises(InputError, match="broken.yaml: not a YAML file"):
        load(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(InputError, match="list.yaml: a job is a mapping"):
        load(tmp_path / "list.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(InputError, match="binary.yaml: the job file cannot be read: not UTF-8"):
        load(tmp_path / "binary.yaml")


def test_what_the_store_keeps_of_a_job_is_the_same_job_again(tmp_path):
    (tmp_path / "features.ts").write_text("x")
    job = parse(changed(features="features.ts", resources={"labels": {"zone": "b"}}), "job.yaml", tmp_path)
    kept = json.loads(json.dumps(job.as_dict()))
    again = from_dict(kept, "job 1")
    assert (again, again.folder) == (job, job.folder)
    del kept["folder"]
    with pytest.raises(InputError, match="job 1 was made by a lamtune that did not keep its folder"):
        from_dict(kept, "job 1")
