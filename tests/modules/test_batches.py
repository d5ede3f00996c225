"""Batches of every shape that dataloaders yield are read, and given back with other inputs and otherwise as they were."""

from __future__ import annotations

import ast
import re
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lightning_wdefense.modules.batches import INPUT_KEYS, LABEL_KEYS, BatchReader
from lightning_wdefense.modules.paths import map_tensors

X, Y, NEW = torch.zeros(4, 3), torch.arange(4), torch.ones(4, 3)


@dataclass
class Plain:
    image: Tensor
    label: Tensor


@dataclass(frozen=True)
class Frozen:
    index: int
    x: Tensor
    target: Tensor


@dataclass(slots=True)
class Slotted:
    image: Tensor
    label: Tensor


@dataclass(frozen=True, slots=True)
class FrozenSlotted:
    image: Tensor
    label: Tensor


@dataclass(slots=True)
class SlottedChild(Slotted):
    index: int = 0


class Thing:
    def __init__(self) -> None:
        self.inputs, self.targets, self._hidden = X, Y, None


class Named(NamedTuple):
    index: Tensor
    image: Tensor
    label: Tensor


class Encoding(UserDict):
    """As transformers' BatchEncoding: a UserDict that also has attributes."""

    def __getattr__(self, name):
        if name == "data":
            raise AttributeError(name)
        return self.data[name]


class Sharing(MutableMapping):
    """A mapping whose shallow copy shares what holds its values."""

    def __init__(self, values) -> None:
        self._values = dict(values)

    def __getitem__(self, key):
        return self._values[key]

    def __setitem__(self, key, value):
        self._values[key] = value

    def __delitem__(self, key):
        del self._values[key]

    def __iter__(self):
        return iter(self._values)

    def __len__(self):
        return len(self._values)


Positional = namedtuple("Positional", ["data", "digit"])

BATCHES = {
    "tuple": (X, Y),
    "long-tuple": (X, Y, "more"),
    "list": [X, Y],
    "dict": {"id": 1, "image": X, "label": Y},
    "ordered-dict": OrderedDict(pixel_values=X, labels=Y),
    "user-dict": UserDict(x=X, y=Y),
    "encoding": Encoding(pixel_values=X, labels=Y),
    "sharing-mapping": Sharing({"input": X, "target": Y}),
    "dataclass": Plain(X, Y),
    "frozen-dataclass": Frozen(7, X, Y),
    "slotted-dataclass": Slotted(X, Y),
    "frozen-slotted-dataclass": FrozenSlotted(X, Y),
    "slotted-child": SlottedChild(X, Y, 7),
    "namedtuple": Named(torch.arange(4), X, Y),
    "positional-namedtuple": Positional(X, Y),
    "object": Thing(),
}


def content(batch) -> dict:
    """Everything in a batch, by key, position or attribute."""
    if isinstance(batch, Mapping):
        return dict(batch)
    if isinstance(batch, (tuple, list)):
        return dict(enumerate(batch))
    names = [name for cls in type(batch).__mro__ for name in getattr(cls, "__slots__", ())]
    return {name: getattr(batch, name) for name in [*names, *getattr(batch, "__dict__", {})]}


@pytest.mark.parametrize("kind", BATCHES)
def test_read_and_replace(kind):
    batch, batches = BATCHES[kind], BatchReader()
    before = content(batch)
    inputs, labels = batches.read(batch)
    assert inputs is X
    assert labels is Y
    changed = batches.replace(batch, NEW)
    assert type(changed) is type(batch)
    found, kept = batches.read(changed)
    assert found is NEW
    assert torch.equal(kept, Y)
    rest = {key: value for key, value in content(changed).items() if not isinstance(value, Tensor)}
    assert rest == {key: value for key, value in before.items() if not isinstance(value, Tensor)}
    # The user's batch is as it was, value by value.
    after = content(batch)
    assert list(after) == list(before)
    assert all(after[key] is value for key, value in before.items())


@pytest.mark.parametrize("inputs_key", INPUT_KEYS)
def test_usual_names_of_inputs(inputs_key):
    assert BatchReader().read({inputs_key: X, "label": Y})[0] is X


@pytest.mark.parametrize("labels_key", LABEL_KEYS)
def test_usual_names_of_labels(labels_key):
    assert BatchReader().read({"image": X, labels_key: Y})[1] is Y


@pytest.mark.parametrize(
    ("batch", "inputs", "labels"),
    [
        ((Y, X), 1, 0),
        ([None, X, Y], 1, 2),
        ((None, X, Y), -2, -1),
        ({"scan": X, "grade": Y}, "scan", "grade"),
        ({"image": NEW, "scan": X, "label": Y}, "scan", None),  # a name that is given wins over the usual ones
        ({0: X, 1: Y}, 0, 1),
        (Positional(Y, X), "digit", "data"),
        (Positional(Y, X), 1, 0),
        (Named(NEW, X, Y), "image", "label"),
        (Plain(Y, X), "label", "image"),
    ],
)
def test_given_names(batch, inputs, labels):
    batches = BatchReader(inputs, labels)
    assert batches.read(batch)[0] is X
    assert batches.read(batch)[1] is Y
    changed = batches.replace(batch, NEW)
    assert batches.read(changed)[0] is NEW
    assert batches.read(changed)[1] is Y
    assert batches.read(batch)[0] is X


@pytest.mark.parametrize(
    ("batch", "options", "message"),
    [
        (X, {}, r"No labels were recognised.*one tensor of shape \(4, 3\).*labels="),
        ((X,), {}, r"No labels were recognised.*a tuple of 1 \(tensor \(4, 3\)\).*labels="),
        (
            {"scan": X, "mri": X, "label": Y},
            {},
            "No inputs were recognised.*a dict with 'scan', 'mri', 'label'.*inputs=.*pixel_values",
        ),
        ({"image": X, "grade": Y}, {}, "No labels were recognised.*'image', 'grade'.*labels="),
        ({}, {}, "No inputs were recognised.*nothing in it"),
        (None, {}, "No inputs were recognised.*NoneType"),
        ("text", {}, "No inputs were recognised.*str"),
        (Frozen(1, X, Y), {"labels": "label"}, "labels='label' names nothing.*Frozen with 'index', 'x', 'target'"),
        ((X, Y), {"inputs": 2}, r"inputs=2 names nothing.*tuple of 2 \(tensor \(4, 3\), tensor \(4,\)\)"),
        ((X, Y), {"inputs": "image"}, "inputs='image' names nothing.*tuple of 2"),
        ({"image": X, "label": Y}, {"inputs": 0}, "inputs=0 names nothing.*'image', 'label'"),
        (Positional(X, Y), {"inputs": "image"}, "inputs='image' names nothing.*Positional with 'data', 'digit'"),
        (Thing(), {"labels": "label"}, "labels='label' names nothing.*Thing with 'inputs', 'targets'"),
    ],
)
def test_errors_list_what_is_there(batch, options, message):
    with pytest.raises(ValueError, match=message):
        BatchReader(**options).read(batch)


@pytest.mark.parametrize("inputs", [{"deep": 1}, "text", None])
def test_inputs_that_are_no_tensor(inputs):
    with pytest.raises(TypeError, match=rf"The inputs of the batch are a {type(inputs).__name__}.*inputs="):
        BatchReader().read((inputs, Y))


BOTH = {"a": (X, Y), "b": (NEW, Y)}

PATHS = [
    # batch, inputs=, what is found
    ({"image": {"pixels": X, "size": 3}, "label": Y}, "image.pixels", [X]),
    ({"image.pixels": X, "label": Y}, "image.pixels", [X]),  # a name that holds a dot
    (((NEW, X), Y), (0, 1), [X]),
    (((NEW, X), Y), "0.1", [X]),
    (((NEW, X), Y), (0, -1), [X]),
    (BOTH, "b.0", [NEW]),
    (BOTH, ("b", 0), [NEW]),
    (BOTH, ["a.0", ("b", 0)], [X, NEW]),
    (Named(0, Plain(X, Y), Y), "image.image", [X]),
    ([{"scan": X}, Y], "0.scan", [X]),
    ({"views": [X, NEW], "label": Y}, "views", [X, NEW]),
    ((X, Y), lambda batch, new=None: batch[0] if new is None else (new, batch[1]), [X]),
    # by convention
    (X, None, [X]),
    ([X], None, [X]),
    (((X, Y), Y), None, [X]),
    (([X, NEW], Y), None, [X, NEW]),
    (BOTH, None, [X, NEW]),
    ([(X, Y), (NEW, Y)], None, [X, NEW]),
    ({"image": {"pixel_values": X}, "label": Y}, None, [X]),
    ({"scan": X, "ids": Y, "attention_mask": torch.ones(4, 3), "label": Y}, None, [X]),
]


@pytest.mark.parametrize(("batch", "inputs", "expected"), PATHS)
def test_inputs_at_any_depth(batch, inputs, expected):
    batches = BatchReader(inputs)
    found = batches.inputs(batch)
    assert [id(each) for each in found] == [id(each) for each in expected]
    new = [torch.randn(4, 3) for _ in found]
    changed = batches.replace(batch, new)
    assert [id(each) for each in batches.inputs(changed)] == [id(each) for each in new]
    assert [id(each) for each in batches.inputs(batch)] == [id(each) for each in expected]
    assert type(changed) is (torch.Tensor if isinstance(batch, torch.Tensor) else type(batch))


@pytest.mark.parametrize(("batch", "key"), [(BOTH, "a.2"), (BOTH, ("c", 0)), (((X, NEW), Y), (0, 2)), (BOTH, "a.0.z")])
def test_a_path_that_leads_nowhere_lists_those_that_lead_somewhere(batch, key):
    with pytest.raises(ValueError, match=r"is not a path in the batch.*Its tensors are: ") as caught:
        BatchReader(key).inputs(batch)
    listed = re.findall(r"('[^']*'|\([^()]*\)) \(", str(caught.value).split("Its tensors are: ")[1])
    assert len(listed) >= 2
    for path in listed:
        assert isinstance(BatchReader(ast.literal_eval(path)).inputs(batch)[0], torch.Tensor)


def test_labels_by_path_and_callable():
    assert BatchReader(labels="a.1").labels(BOTH) is Y
    assert BatchReader(labels=lambda batch: batch["b"][1]).labels(BOTH) is Y
    assert BatchReader().labels_or_none(BOTH) is None
    assert BatchReader().labels_or_none(X) is None
    with pytest.raises(ValueError, match="labels='c' names nothing"):
        BatchReader(labels="c").labels_or_none(BOTH)


def test_several_tensors_are_not_one():
    with pytest.raises(ValueError, match="has 2 tensors of inputs"):
        BatchReader(labels="a.1").read(BOTH)


def test_every_tensor_of_a_batch():
    batch = {"a": (X, "text"), "b": Frozen(1, X, Y), "c": [NEW, None], "d": Slotted(X, Y)}
    changed = map_tensors(batch, lambda each: each + 1)
    assert torch.equal(changed["a"][0], X + 1)
    assert changed["a"][1] == "text"
    assert torch.equal(changed["b"].x, X + 1)
    assert torch.equal(changed["c"][0], NEW + 1)
    assert batch["a"][0] is X
    assert batch["b"].x is X
    shared = {"loader": object(), "x": X}
    assert map_tensors(shared, lambda each: each) is shared
