"""A CVAT whose task the function has annotated, and fixtures around it, for the tests of `defectcam cvat annotate`."""

import copy
import logging

import pytest

from defectcam.cvat import annotate
from defectcam.cvat_labels import labels_with, task_labels
from defectcam.handler import ModelHandler
from defectcam.proposal_log import ProposalLog, image_hash
from tests.conftest import dark_wall, dark_weights
from tests.cvat_state import ACCESS_TOKEN, KEY, CvatState, serving

LOG = logging.getLogger("test")
SEVERITY = {"name": "severity", "input_type": "select", "values": ["low", "high"], "default_value": "low"}
SPOTS = [(30, 30, 14), (100, 26, 12), (36, 78, 13), (110, 74, 15)]  # one photo's defects, far apart


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return dark_weights(tmp_path_factory.mktemp("weights"), ["crack", "rust"])


@pytest.fixture(scope="module")
def photos():
    return [dark_wall(SPOTS, seed=seed)[0] for seed in range(3)]


@pytest.fixture(scope="module")
def function(weights):
    """Function (image_rgb, T, environ) -> answer, as the deployed function gives it; cached."""
    answers = {}

    def answer(image_rgb, steps, **environ):
        key = image_hash(image_rgb), steps, *environ.items()
        if key not in answers:
            environ = {"ADVCAM_ITERATIONS": str(steps), "ADVCAM_WEIGHTS": str(weights), "ADVCAM_DEVICE": "cpu", **environ}
            model = ModelHandler.from_env(environ, LOG)
            answers[key] = model.propose(image_rgb, model.settings), model
        return copy.deepcopy(answers[key][0])

    answer.model = lambda image_rgb, steps: (answer(image_rgb, steps), answers[image_hash(image_rgb), steps][1])[1]
    return answer


@pytest.fixture(scope="module")
def remembering():
    """What `ModelHandler.from_env` and its `answer` gave before they give again, which saves minutes; everything is real."""
    load, compute = ModelHandler.from_env.__func__, ModelHandler.answer
    models, answers = {}, {}

    def from_env(cls, environ, logger):
        key = tuple(sorted(item for item in environ.items() if item[0].startswith("ADVCAM_")))
        models[key] = models.get(key) or load(cls, environ, logger)
        return models[key]

    def answer(self, request):
        key = id(self), self.masks, request.image_bytes
        answers[key] = answers.get(key) or compute(self, request)
        return copy.deepcopy(answers[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelHandler, "from_env", classmethod(from_env))
        patch.setattr(ModelHandler, "answer", answer)
        yield


class Place:
    """A CVAT whose task has been annotated at T = 0 by the function, the function's log, and the command."""

    def __init__(self, cvat, function, folder, capsys):
        self.cvat, self.function, self.folder, self.capsys = cvat, function, folder / "log", capsys
        self.token = ACCESS_TOKEN if cvat.is_new else KEY
        log = ProposalLog(self.folder, LOG)
        for frame, photo in enumerate(cvat.photos):
            answer = function(photo, 0)
            model = function.model(photo, 0)
            in_force = {defect: model.effective(defect, model.settings) for defect in model.defects}
            log.append(image_hash(photo), photo.shape[1], photo.shape[0], model.weights.version, in_force, answer)
            cvat.automatic_annotation(frame, answer)

    def annotate(self, *options, steps=1, status=0):
        """What the command prints."""
        with serving(self.cvat) as url:
            end = 0
            try:
                annotate.main(["12", "--iterations", str(steps), "--url", url, *map(str, options)])
            except SystemExit as stopped:
                end = stopped.code
        printed = self.capsys.readouterr()
        told = f"{printed.out}{printed.err}"
        assert end == status or (status == 1 and isinstance(end, str)), f"{told}{end}"
        return f"{told}{end}"

    def names(self, frame, label="crack"):
        return [self.cvat.value(shape, "proposal") for shape in self.cvat.of(frame, label)]

    def wanted(self, frame, label="crack", steps=1, **environ):
        """Names of what the function proposes on a frame."""
        answer = self.function(self.cvat.photos[frame], steps, **environ)
        return sorted(e["attributes"][2]["value"] for e in answer if e["label"] == label)


@pytest.fixture(params=[False, True], ids=["2.15", "2.73"])
def version(request):
    return request.param


@pytest.fixture
def make(photos, weights, function, remembering, tmp_path, capsys, monkeypatch):
    """Function (number of photos, arguments of CvatState) -> Place."""
    monkeypatch.setenv("ADVCAM_WEIGHTS", str(weights))
    monkeypatch.setenv("ADVCAM_DEVICE", "cpu")

    def place(count=1, **options):
        labels = task_labels(labels_with([]))
        for label in labels:
            if label["type"] == "polygon":
                label["attributes"].append(SEVERITY)
        cvat = CvatState(photos[:count], labels, **options)
        monkeypatch.setenv("ADVCAM_CVAT_TOKEN", ACCESS_TOKEN if cvat.is_new else KEY)
        return Place(cvat, function, tmp_path, capsys)

    return place
