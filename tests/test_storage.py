"""Models on disk: what is loaded is what was saved, and nothing else is accepted."""

import errno
import pickle
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import KFold

import cvxnn
from cvxnn import files, storage
from cvxnn.errors import CertificationWarning, InvalidInputError, StorageError
from cvxnn.files import read_tensors, write_tensors
from cvxnn.networks import TwoLayerNetwork
from cvxnn.tables import TablePreprocessor

RNG = np.random.default_rng(0)
X = RNG.standard_normal((40, 3))
NEW = RNG.standard_normal((25, 3))
Y_CLASS = np.argmax(X @ RNG.standard_normal((3, 3)), axis=1)
Y_REAL = np.sin(X[:, 0]) + X[:, 1]
GATES = RNG.standard_normal((4, 5))

MODELS = {
    "classifier": (cvxnn.ConvexMLPClassifier(n_gates=8, random_state=0), Y_CLASS),
    "cross_entropy": (cvxnn.ConvexMLPClassifier(n_gates=4, loss="cross_entropy", beta=0.05, tol=0.01), Y_CLASS),
    "two_classes": (cvxnn.ConvexMLPClassifier(n_gates=8, random_state=0), np.where(Y_CLASS > 0, "yes", "no")),
    "linear": (cvxnn.ConvexMLPClassifier("linear", hidden_bias=False), Y_CLASS),
    "float32": (cvxnn.ConvexMLPClassifier(n_gates=8, dtype="float32", random_state=0), Y_CLASS),
    "zero": (cvxnn.ConvexMLPRegressor(n_gates=8, beta=100.0, random_state=0), Y_REAL),
    "given_gates": (cvxnn.ConvexMLPRegressor(gates=GATES, norms=("l2", "l2")), Y_REAL),
    "regressor": (cvxnn.ConvexMLPRegressor(n_gates=8, random_state=0), Y_REAL),
    "two_outputs": (cvxnn.ConvexMLPRegressor(n_gates=8, output_bias=False, random_state=0), np.c_[Y_REAL, X[:, 2]]),
    "one_column": (cvxnn.ConvexMLPRegressor(n_gates=8, random_state=0), Y_REAL[:, None]),
    "classifier_cv": (cvxnn.ConvexMLPClassifierCV(n_gates=4, n_betas=3, cv=2, random_state=0), Y_CLASS),
    "regressor_cv": (cvxnn.ConvexMLPRegressorCV(n_gates=4, betas=[0.1, 0.01], cv=2, random_state=0), Y_REAL),
}


@pytest.fixture(scope="module")
def fitted():
    return {name: model.fit(X, y) for name, (model, y) in MODELS.items()}


@pytest.fixture
def model(fitted):
    return fitted["classifier"]


@pytest.fixture
def saved(tmp_path, model):
    return cvxnn.save(model, tmp_path / "model.safetensors")


def identical(a, b):
    return type(a) is type(b) and a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("name", MODELS)
def test_loaded_model_is_the_same(tmp_path, fitted, name):
    model, y = fitted[name], MODELS[name][1]
    path = cvxnn.save(model, tmp_path / "model.safetensors")
    loaded = cvxnn.load(str(path))
    assert type(loaded) is type(model)
    for method in ("predict", "predict_proba", "decision_function"):
        if hasattr(model, method):
            assert identical(getattr(loaded, method)(NEW), getattr(model, method)(NEW)), method
    assert loaded.score(X, y) == model.score(X, y)
    assert loaded.certificate_ == model.certificate_
    assert identical(loaded.dual_, model.result_.dual)
    assert (loaded.status_, loaded.seconds_) == (model.result_.status, model.result_.seconds)
    assert (loaded.n_iter_, loaded.n_features_in_) == (model.n_iter_, 3)
    assert not hasattr(loaded, "result_")
    for key, value in model.network_.state_dict().items():
        assert identical(loaded.network_.state_dict()[key], value), key
    if hasattr(model, "classes_"):
        assert identical(loaded.classes_, model.classes_)
    wanted = model.get_params()
    assert {k: v for k, v in loaded.get_params().items() if k != "gates"} == {
        k: v for k, v in wanted.items() if k != "gates"
    }
    assert np.array_equal(loaded.gates, wanted["gates"])


@pytest.mark.parametrize("name", ["classifier_cv", "regressor_cv"])
def test_cross_validation_is_kept(tmp_path, fitted, name):
    model = fitted[name]
    loaded = cvxnn.load(cvxnn.save(model, tmp_path / "a"))
    assert loaded.beta_ == model.beta_
    assert np.array_equal(loaded.betas_, model.betas_)
    assert np.array_equal(loaded.cv_scores_, model.cv_scores_)


def test_file_can_be_saved_again_and_refitted(tmp_path, saved, model):
    again = cvxnn.save(cvxnn.load(saved), tmp_path / "again")
    assert again.read_bytes() == saved.read_bytes()
    refitted = cvxnn.load(saved).fit(X, Y_CLASS)
    assert np.array_equal(refitted.predict(NEW), model.predict(NEW))
    other = cvxnn.load(saved).fit(X[:20], Y_CLASS[:20])
    assert identical(cvxnn.load(cvxnn.save(other, again)).dual_, other.result_.dual)


def test_dual_repeats_the_proof(saved, model):
    loaded, problem = cvxnn.load(saved), model.result_.problem
    certificate = cvxnn.certify(problem, Z=model.result_.Z, intercept=model.result_.intercept, dual=loaded.dual_)
    assert certificate.relative_gap <= model.certificate_.relative_gap * (1 + 1e-9)


def test_dual_is_that_of_merged_samples(tmp_path):
    """It repeats the proof for the samples as ``merge_duplicates`` gives them, not as they were passed."""
    data, labels = np.vstack([X, X[:7]]), np.concatenate([Y_CLASS, Y_CLASS[:7]])
    model = cvxnn.ConvexMLPClassifier(n_gates=5, beta=0.01, random_state=0).fit(data, labels)
    loaded = cvxnn.load(cvxnn.save(model, tmp_path / "a"))
    one_hot = (labels[:, None] == model.classes_).astype(float)
    merged, targets, weights = cvxnn.samples.merge_duplicates(data, one_hot, np.ones(len(data)))
    assert loaded.dual_.shape == targets.shape != one_hot.shape
    options = {"gates": model.network_.gates, "beta": 0.01, "hidden_bias": True, "output_bias": True}
    problem = cvxnn.mlp_problem(merged, targets, sample_weight=weights, **options)
    Z, intercept = model.result_.Z, model.result_.intercept
    certificate = cvxnn.certify(problem, Z=Z, intercept=intercept, dual=loaded.dual_)
    assert certificate.relative_gap == pytest.approx(model.certificate_.relative_gap, abs=1e-12)
    assert cvxnn.certify(problem, Z=Z, intercept=intercept).relative_gap >= certificate.relative_gap


LABELS = {
    "int64": np.array([3, -7]),
    "int8": np.array([1, 2], dtype=np.int8),
    "uint64": np.array([1, 2**64 - 1], dtype=np.uint64),
    "bool": np.array([False, True]),
    "float64": np.array([1.0, 2.0]),
    "float32": np.array([-1.0, 1.0], dtype=np.float32),
    "text": np.array(["ä", "b\U0001f600"]),
    "wide": np.array(["a", "b"], dtype="<U20"),
    "object": np.array(["a", "long name"], dtype=object),
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_class_labels_keep_their_type(tmp_path, labels):
    model = cvxnn.ConvexMLPClassifier(n_gates=3, beta=0.1, random_state=0).fit(X, labels[(X[:, 0] > 0).astype(int)])
    loaded = cvxnn.load(cvxnn.save(model, tmp_path / "a"))
    assert identical(loaded.classes_, model.classes_)
    assert identical(loaded.predict(NEW), model.predict(NEW))


def test_labels_that_cannot_be_stored(tmp_path, model, monkeypatch):
    monkeypatch.setattr(model, "classes_", np.array(["2020-01-01"] * 3, dtype="datetime64[D]"))
    with pytest.raises(InvalidInputError, match=r"classes_ are of type datetime64\[D\]"):
        cvxnn.save(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_feature_names_are_kept(tmp_path):
    frame = pd.DataFrame(X, columns=["a", "b", "ö"])
    model = cvxnn.ConvexMLPRegressor(n_gates=4, random_state=0).fit(frame, Y_REAL)
    loaded = cvxnn.load(cvxnn.save(model, tmp_path / "a"))
    assert identical(loaded.feature_names_in_, model.feature_names_in_)
    with pytest.raises(ValueError, match="feature names"):
        loaded.predict(frame[["b", "a", "ö"]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(loaded.predict(frame), model.predict(frame))


def test_preprocessor_is_kept(tmp_path):
    table = pd.DataFrame({"size": X[:, 0], "colour": np.where(X[:, 1] > 0, "red", "blue"), "y": Y_REAL})
    preprocessor = TablePreprocessor("y", split={"test_size": 0.25, "seed": 3}).fit(table)
    model = cvxnn.ConvexMLPRegressor(n_gates=4, random_state=0).fit(preprocessor.transform(table), Y_REAL)
    model.preprocessor_ = preprocessor
    loaded = cvxnn.load(cvxnn.save(model, tmp_path / "a"))
    assert loaded.preprocessor_.to_dict() == preprocessor.to_dict()
    assert np.array_equal(loaded.preprocessor_.transform(table), preprocessor.transform(table))
    preprocessor.split = {"data": object()}
    with pytest.raises(InvalidInputError, match="model has a preprocessor_ that cannot be stored"):
        cvxnn.save(model, tmp_path / "b")


def test_parameters_that_are_objects(tmp_path):
    random_state = np.random.RandomState(0)
    model = cvxnn.ConvexMLPRegressorCV(
        n_gates=4, betas=np.array([0.1, 0.01]), cv=KFold(2), random_state=random_state, norms=("l2", "l2")
    ).fit(X, Y_REAL)
    loaded = cvxnn.load(cvxnn.save(model, tmp_path / "a"))
    assert loaded.random_state is None
    assert loaded.cv is None
    assert loaded.betas.tolist() == [0.1, 0.01]
    assert loaded.norms == ("l2", "l2")


@pytest.mark.parametrize("as_type", [np.asarray, torch.tensor, pd.DataFrame, np.ndarray.tolist])
def test_gates_of_any_type(tmp_path, as_type):
    model = cvxnn.ConvexMLPRegressor(gates=as_type(GATES), dtype=np.float64).fit(X, Y_REAL)
    loaded = cvxnn.load(cvxnn.save(model, tmp_path / "a"))
    assert np.array_equal(np.asarray(loaded.gates), GATES)
    assert np.array_equal(loaded.fit(X, Y_REAL).predict(NEW), model.predict(NEW))


def test_certificate_with_infinities(tmp_path):
    with pytest.warns(CertificationWarning):
        model = cvxnn.ConvexMLPRegressor("linear", max_iter=1, tol=1e-300, beta=1e-12).fit(X, X[:, 0])
    certificate = model.certificate_
    model.certificate_ = type(certificate)(**vars(certificate) | {"theorem_bound": np.inf, "relative_gap": np.inf})
    assert cvxnn.load(cvxnn.save(model, tmp_path / "a")).certificate_ == model.certificate_


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bare_network(tmp_path, model, dtype):
    network = model.result_.network(dtype=dtype)
    loaded = cvxnn.load(cvxnn.save(network, tmp_path / "a"))
    assert type(loaded) is TwoLayerNetwork
    x = torch.from_numpy(NEW)
    assert torch.equal(loaded(x), network(x))
    assert loaded.sample_dtype == torch.float64
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def network_of(**changes):
    weights = {
        "hidden": torch.ones(2, 3),
        "output": torch.ones(3, 1),
        "bias": torch.zeros(1),
        "gates": torch.ones(2, 4, dtype=torch.float64),
        "gate_index": torch.tensor([0, 3, 1]),
    }
    return TwoLayerNetwork(**weights | changes)


def test_network_that_fits(tmp_path):
    assert cvxnn.load(cvxnn.save(network_of(), tmp_path / "a")).gates.shape == (2, 4)


BAD_NETWORKS = [
    ({"hidden": torch.ones(2, 3).half()}, "float32 or float64"),
    ({"output": torch.ones(3, 1).double()}, "types of its layers differ"),
    ({"output": torch.ones(2, 1)}, "its layers have shapes"),
    ({"bias": torch.ones(2)}, "its layers have shapes"),
    ({"gates": torch.ones(2, 4)}, "its gates have shape"),
    ({"gates": torch.ones(3, 4).double()}, "its gates have shape"),
    ({"gates": None}, "only hidden, output, bias, gate_index of the tensors"),
    ({"gate_index": torch.tensor([0, 4, 1])}, "refers to gates that it does not have"),
    ({"gate_index": torch.tensor([0, -1, 1])}, "refers to gates that it does not have"),
    ({"gate_index": torch.tensor([0, 1])}, "its gate_index has shape"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_NETWORKS)
def test_networks_that_do_not_fit(tmp_path, changes, message):
    with pytest.raises(InvalidInputError, match=message):
        cvxnn.save(network_of(**changes), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
    arrays = {f"network.{k}": v.detach().numpy() for k, v in network_of(**changes).state_dict().items()}
    header = {"class": "TwoLayerNetwork", "network": {"hidden_bias": False, "sample_dtype": "float32"}}
    write_tensors(tmp_path / "a", "model", header, arrays)
    with pytest.raises(StorageError, match=f"holds no model that can be restored: .*{message}"):
        cvxnn.load(tmp_path / "a")


@pytest.mark.parametrize("other", [LinearRegression(), torch.nn.Linear(2, 1), "model", None, 3, cvxnn])
def test_objects_that_are_no_model(tmp_path, other):
    with pytest.raises(InvalidInputError, match=rf"model is a {type(other).__name__}; one of ConvexMLP.* is wanted"):
        cvxnn.save(other, tmp_path / "a")


def test_subclass_is_no_known_model(tmp_path):
    class ConvexMLPClassifier(cvxnn.ConvexMLPClassifier):
        pass

    with pytest.raises(InvalidInputError, match="one of"):
        cvxnn.save(ConvexMLPClassifier(), tmp_path / "a")


@pytest.mark.parametrize("cls", [cvxnn.ConvexMLPClassifier, cvxnn.ConvexMLPRegressorCV])
def test_unfitted_model(tmp_path, cls):
    with pytest.raises(InvalidInputError, match=f"model is a {cls.__name__} that is not fitted; call fit"):
        cvxnn.save(cls(), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def small_model():
    return cvxnn.ConvexMLPClassifier(n_gates=2, beta=0.05, random_state=0).fit(X[:6], X[:6, 0] > 0)


def test_every_truncation_is_refused(tmp_path):
    path = cvxnn.save(small_model(), tmp_path / "a")
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(StorageError):
            cvxnn.load(path)


def test_every_flipped_byte_is_refused_or_harmless(tmp_path):
    model = small_model()
    path = cvxnn.save(model, tmp_path / "a")
    content, refused = path.read_bytes(), 0
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        try:
            loaded = cvxnn.load(path)
        except StorageError:
            refused += 1
        else:
            assert np.array_equal(loaded.predict_proba(NEW), model.predict_proba(NEW)), position
            assert loaded.certificate_ == model.certificate_, position
            assert repr(loaded.get_params()) == repr(model.get_params()), position
    assert refused > 0.9 * len(content)


@pytest.mark.parametrize("field", ["class", "network", "parameters", "fitted", "classes", "certificate"])
@pytest.mark.parametrize("value", [None, 3, "x", [], {"a": {"b": "c"}}, [[1]], True, 1e308, {"dict": {}}])
def test_header_fields_of_another_type(tmp_path, saved, field, value):
    header, arrays = read_tensors(saved, "model")
    write_tensors(tmp_path / "a", "model", header | {field: value}, arrays)
    with pytest.raises(StorageError, match="holds no model that can be restored: "):
        cvxnn.load(tmp_path / "a")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("class",), "os.system", "its class is 'os.system', which this version of cvxnn does not have"),
        (("class",), "BaseEstimator", "which this version of cvxnn does not have"),
        (("feature_names",), "abc", "its field feature_names is 'abc'; list or nothing is wanted"),
        (("feature_names",), [1, 2, 3], "3 strings are wanted"),
        (("feature_names",), ["a"], "3 strings are wanted"),
        (("preprocessing",), [], "its field preprocessing is"),
        (("preprocessing",), {"dict": {"columns": 3}}, "no description of a table preprocessor"),
        (("fitted", "n_iter_"), "3", "its field n_iter_ is '3'; int is wanted"),
        (("fitted", "n_iter_"), True, "its field n_iter_ is 'True'; int is wanted"),
        (("fitted", "n_features_in_"), 4, "its n_features_in_ is 4; its network has 3 inputs"),
        (("fitted", "status_"), None, "its field status_ is 'None'; str is wanted"),
        (("fitted", "seconds_"), "now", "its field seconds_ is 'now'; float is wanted"),
        (("parameters", "__class__"), "x", "parameter '__class__' is unknown to this version"),
        (("parameters", "from_the_future"), 1, "parameter 'from_the_future' is unknown to this version"),
        (("parameters", "gates"), {"array": "missing"}, "cannot be read"),
        (("parameters", "beta"), {"pickle": "gASVAAAAAAAA"}, "cannot be read"),
        (("network", "hidden_bias"), 1, "its field hidden_bias is '1'; bool is wanted"),
        (("network", "hidden_bias"), False, "its n_features_in_ is 3; its network has 4 inputs"),
        (("network", "sample_dtype"), "float16", "its field sample_dtype is 'float16'"),
        (("classes", "dtype"), "O8", "its labels are of type 'O8'"),
        (("classes", "dtype"), "<U99999999999", "its labels are of type"),
        (("classes",), {"dtype": "|i1", "values": [1, 2, 300]}, "holds no model that can be restored: .*300"),
        (("classes",), {"dtype": "<U1", "values": ["a", "b", "cc"]}, "its labels do not fit into the type '<U1'"),
        (("classes", "values"), [1, 2], "it has 2 classes; its network has 3 outputs"),
        (("classes", "values"), [1, [2], 3], "neither numbers nor strings"),
        (("certificate", "dict", "primal"), "low", "its field primal is 'low'; float is wanted"),
        (("certificate", "dict", "scope"), 3, "its field scope is '3'; str is wanted"),
        (("certificate", "dict", "gate_ratios"), {"tuple": ["x"]}, "gate_ratios that are no numbers"),
        (("certificate", "dict", "theorem_bound"), "x", "its field theorem_bound is 'x'; float or nothing is wanted"),
        (("certificate", "dict", "surprise"), 1.0, "surprise"),
    ],
)
def test_crafted_headers(tmp_path, fitted, path, value, message):
    model = fitted["classifier"]
    header, arrays = read_tensors(cvxnn.save(model, tmp_path / "a"), "model")
    fields = header
    for key in path[:-1]:
        fields = fields[key]
    fields[path[-1]] = value
    write_tensors(tmp_path / "a", "model", header, arrays)
    with pytest.raises(StorageError, match=message):
        cvxnn.load(tmp_path / "a")


@pytest.mark.parametrize("name", ["network.hidden", "network.bias", "network.gate_index", "network.gates"])
def test_missing_or_wrong_tensors(tmp_path, saved, name):
    header, arrays = read_tensors(saved, "model")
    for changed in ({}, {name: arrays[name].astype(np.int8)}, {name: arrays[name].ravel()[:2]}):
        write_tensors(tmp_path / "a", "model", header, {k: v for k, v in arrays.items() if k != name} | changed)
        with pytest.raises(StorageError, match="holds no model that can be restored"):
            cvxnn.load(tmp_path / "a")


def test_file_of_a_newer_format(tmp_path, model, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(files, "FORMAT_VERSION", files.FORMAT_VERSION + 1)
        path = cvxnn.save(model, tmp_path / "a")
    with pytest.raises(StorageError, match=r"newer format .*; upgrade cvxnn"):
        cvxnn.load(path)


def test_files_that_are_no_model(tmp_path):
    write_tensors(tmp_path / "checkpoint", "checkpoint", {}, {})
    with pytest.raises(StorageError, match="holds a checkpoint; a model is wanted"):
        cvxnn.load(tmp_path / "checkpoint")
    with pytest.raises(StorageError, match="is a folder"):
        cvxnn.load(tmp_path)
    with pytest.raises(StorageError, match="does not exist"):
        cvxnn.load(tmp_path / "missing")
    with pytest.raises(InvalidInputError, match="path is None"):
        cvxnn.load(None)


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_pickles_are_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a").write_bytes(pickle.dumps(Bomb()))
    torch.save({"x": torch.ones(2), "bomb": Bomb()}, "b")
    for name in ("a", "b"):
        with pytest.raises(StorageError, match="not a file written by cvxnn"):
            cvxnn.load(name)
    assert not Path("exploded").exists()


def test_full_disk_leaves_the_old_model(tmp_path, saved, model, fitted, monkeypatch):
    def full(arrays, target, metadata):
        Path(target).write_bytes(b"half of the file")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(StorageError, match=r"cannot write .*No space left on device"):
        cvxnn.save(fitted["regressor"], saved)
    assert list(tmp_path.iterdir()) == [saved]
    assert np.array_equal(cvxnn.load(saved).predict(NEW), model.predict(NEW))


def test_header_is_readable_by_anyone(saved):
    with safe_open(saved, framework="numpy") as stream:
        assert {"network.hidden", "network.gates", "dual_"} <= set(stream.keys())
        assert '"class": "ConvexMLPClassifier"' in stream.metadata()["cvxnn"]


def test_every_estimator_can_be_stored():
    names = {name for name in cvxnn.__all__ if name.startswith("Convex")}
    assert names == set(storage._ESTIMATORS)
