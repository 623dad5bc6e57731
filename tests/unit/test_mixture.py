"""Mixtures: shares of tokens, every sample once an epoch, and one order whatever it is read by."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.arguments import DataArguments, parse_arguments
from dstrain.data import build_data, build_tokenizer
from dstrain.data.mixture import Mixture, mixture_parts
from dstrain.data.packing import Samples
from dstrain.errors import UserError
from tests.unit.test_loader import step_ids

GOLDEN = [0, 2, 3, 1, 2, 0, 3, 1, 1, 2, 3, 0, 2, 1, 0, 3]


class Sized(Samples):
    """Sample i holds token_counts[i] times the number first + i."""

    def __init__(self, counts, first=0):
        self.block_size, self.first = int(max(counts)), first
        self.token_counts = np.asarray(counts)
        self.label_counts = self.token_counts - 1

    def __getitem__(self, index):
        ids = np.full(self.token_counts[index], self.first + index)
        return {"input_ids": ids, "labels": ids.copy()}


def mixture_of(*sources):
    """From (token counts, weight) of each source; every sample's tokens are its index in the mixture."""
    firsts = np.cumsum([0, *(len(counts) for counts, _ in sources)])
    return Mixture([Sized(c, f) for (c, _), f in zip(sources, firsts, strict=False)], [w for _, w in sources])


def check_shares(mixture, order, positions):
    """Reads the order itself: the bound of the module's docstring holds at every position."""
    owner = np.repeat(np.arange(len(mixture.sources)), [len(source) for source in mixture.sources])
    items = np.array([order[position] for position in range(positions)])
    tokens = np.zeros((len(mixture.sources), positions), np.int64)
    tokens[owner[items], np.arange(positions)] = mixture.token_counts[items]
    tokens = tokens.cumsum(axis=1)
    shares = np.array(mixture.weights)[:, None] / sum(mixture.weights)
    longest = mixture.token_counts.max()
    off = np.abs(tokens - shares * tokens.sum(axis=0))
    assert off.max() <= longest * max(1, len(mixture.sources) / 2) + 1e-6
    for number in range(len(mixture.sources)):
        own = items[owner[items] == number]
        size = int((owner == number).sum())
        expected = np.flatnonzero(owner == number)
        for start in range(0, len(own) - size + 1, size):  # each once in each of its epochs
            assert sorted(own[start : start + size]) == expected.tolist()
    return items, tokens


sources_of = st.lists(
    st.tuples(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.floats(0.05, 20)), min_size=1, max_size=4
)


@given(sources_of, st.integers(0, 2**32))
@settings(max_examples=15)
def test_shares_hold_at_every_position_and_samples_come_once_an_epoch(sources, seed):
    mixture = mixture_of(*sources)
    items, tokens = check_shares(mixture, mixture.order(seed), 150)
    order = mixture.order(seed)
    assert order.tokens(100) == tokens[:, 99].tolist()
    assert sum(order.counts(100)) == 100
    assert [mixture[int(i)]["input_ids"][0] for i in items[:20]] == items[:20].tolist()


@given(sources_of, st.integers(0, 10**7), st.integers(0, 30))
@settings(max_examples=10)
def test_the_order_does_not_depend_on_where_one_begins(sources, position, before):
    mixture = mixture_of(*sources)
    begun_before, begun_here = mixture.order(1), mixture.order(1)
    first = max(0, position - before)
    assert [begun_before[i] for i in range(first, position + 5)][-5:] == [begun_here[position + i] for i in range(5)]


def test_large_sources_keep_shares_over_slices_and_epochs():
    draw = np.random.default_rng(0)
    sources = [(draw.integers(1, 500, 9000), 1.0), (np.full(5000, 100), 3.0), (draw.integers(1, 50, 2), 0.2)]
    mixture = mixture_of(*sources)
    items, tokens = check_shares(mixture, mixture.order(5), 40_000)
    later = mixture.order(5)
    for position in (39_990, 4095, 4096, 9001, 20_000, 0, 39_000):  # in both directions
        assert [later[position + i] for i in range(10)] == items[position : position + 10].tolist()
        assert later.tokens(position + 1) == tokens[:, position].tolist()
    assert mixture.order(6)[0] != items[0] or mixture.order(6)[1] != items[1]


def test_the_order_never_changes():
    """Runs that began with an older version resume in the same order: these numbers may never change."""
    order = mixture_of(([2, 2, 4], 3), ([3], 1)).order(42)
    assert [order[i] for i in range(16)] == GOLDEN


@pytest.mark.parametrize(("micro_batch", "dp_size"), [(8, 1), (2, 2), (1, 4)])
def test_any_division_and_any_restart_reads_the_same_order(micro_batch, dp_size):
    mixture = mixture_of(([3, 1, 4, 1, 5], 2.5), ([2] * 7, 1), ([9, 2], 0.5))
    order = mixture.order(7)
    expected = [[order[16 * step + i] for i in range(16)] for step in range(10)]
    division = {"global_batch": 16, "micro_batch": micro_batch, "dp_size": dp_size}
    assert step_ids(mixture, 10, **division) == expected
    assert step_ids(mixture, 4, consumed=96, **division) == expected[6:]


def build(tmp_path, seed=42, **flags):
    return build_data(
        DataArguments(**flags),
        build_tokenizer("bytes"),
        seed=seed,
        block_size=64,
        is_main_per_host=True,
        barrier=lambda: None,
        cache_dir=tmp_path / "cache",
    )


@pytest.fixture
def three_files(tmp_path):
    """Long texts, short prompt rows of different lengths, and one small text."""
    draw = np.random.default_rng(1)
    files = {
        "long.jsonl": [{"text": "long story. " * int(draw.integers(20, 200))} for _ in range(150)],
        "rows.jsonl": [
            {"prompt": "q" * int(draw.integers(1, 50)), "completion": "a" * int(draw.integers(1, 30))}
            for _ in range(3000)
        ],
        "small.jsonl": [{"text": "few words"}] * 30,
    }
    for name, rows in files.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(tmp_path / name) for name in files]


def test_three_sources_keep_their_shares_over_a_million_tokens(tmp_path, three_files):
    weights = [5.0, 3.0, 2.0]
    data = build(tmp_path, train_file=three_files, train_weight=weights)
    owner = np.repeat(np.arange(3), [len(source) for source in data.train.sources])
    order, tokens, position = data.train.order(42), np.zeros(3, np.int64), 0
    while tokens.sum() < 1_000_000:
        index = order[position]
        tokens[owner[index]] += len(data.train[index]["input_ids"])
        position += 1
    assert np.abs(tokens / tokens.sum() - [0.5, 0.3, 0.2]).max() < 0.001
    sources = data.facts["sources"]
    assert [source["share_wanted"] for source in sources] == [0.5, 0.3, 0.2]
    assert [source["share_reached"] for source in sources] == pytest.approx([0.5, 0.3, 0.2], abs=0.005)
    assert sources[2]["passes"] > 50 > 1 > sources[0]["passes"]
    assert [source["num_samples"] for source in sources] == [len(source) for source in data.train.sources]
    assert len(data.train) == data.facts["num_samples"] == sum(source["num_samples"] for source in sources)
    assert data.num_tokens == data.facts["num_tokens"]
    json.dumps(data.facts)


def test_each_source_holds_out_its_own_samples(tmp_path, three_files):
    data = build(tmp_path, train_file=three_files, train_weight=[1.0, 1.0, 1.0])
    alone = [build(tmp_path, train_file=[file]) for file in three_files]
    assert len(data.validation) == sum(len(part.validation) for part in alone) == data.facts["num_validation_samples"]
    held_out = [data.validation[i]["input_ids"].tolist() for i in range(len(data.validation))]
    assert held_out == [p.validation[i]["input_ids"].tolist() for p in alone for i in range(len(p.validation))]
    other = build(tmp_path, train_file=three_files, train_weight=[1.0, 1.0, 2.0])
    assert other.samples_sha256 != data.samples_sha256
    assert other.sha256 == data.sha256
    named = build(tmp_path, train_file=three_files[:2], train_weight=[1.0, 1.0], validation_file=[three_files[2]])
    assert len(named.validation) == named.facts["num_validation_samples"] == 4  # 30 x 10 tokens in blocks of 64
    assert len(named.train) > len(alone[0].train) + len(alone[1].train)


def test_a_yaml_file_names_files_and_weights(tmp_path, three_files):
    names = [name.rsplit("/", 1)[1] for name in three_files]
    listed = "".join(f"  - {{file: {name}, weight: {w}}}\n" for name, w in zip(names, (5, 3, 2), strict=True))
    (tmp_path / "mix.yaml").write_text(f"sources:\n{listed}")
    described = build(tmp_path, train_file=[str(tmp_path / "mix.yaml")])
    flags = build(tmp_path, train_file=three_files, train_weight=[5.0, 3.0, 2.0])
    assert described.samples_sha256 == flags.samples_sha256
    assert described.facts["sources"][0]["source"] == three_files[0]
    assert mixture_parts(DataArguments(train_file=three_files)) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("sources: []", "has no list `sources`"),
        ("- a", "has no list `sources`"),
        ("sources: [{file: a, weight: 1}]\nsource: 3", "unknown name source: did you mean sources?"),
        ("sources: [{file: a, waight: 1}]", "source 1: unknown name waight: did you mean weight?"),
        ("sources: [{file: a, weight: 1}, {weight: 1}]", "source 2: it has no `file`"),
        ("sources: [{file: a, weight: 0}]", "source 1: `weight` is 0: write a positive number"),
        ("sources: [{file: a, weight: true}]", "`weight` is True: write a positive number"),
        ("sources: [{file: a, weight: .inf}]", "`weight` is inf: write a positive number"),
        ("sources: [a.txt]", "source 1: 'a.txt' is no table"),
        ("sources: [", "is not valid YAML"),
        ("sources: [{file: nowhere.txt, weight: 1}]", "nowhere.txt matches no file"),
    ],
)
def test_a_wrong_yaml_file_is_refused(tmp_path, text, problem):
    (tmp_path / "mix.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        build(tmp_path, train_file=[str(tmp_path / "mix.yaml")])
    assert any(problem in line for line in caught.value.problems)
    assert all("\n" not in line for line in caught.value.problems)


def test_a_yaml_file_stands_alone(tmp_path):
    for flags in ({"train_file": ["mix.yaml", "b.txt"]}, {"train_file": ["mix.yml"], "train_weight": [1.0]}):
        with pytest.raises(UserError, match="give it alone, without --train_weight"):
            build(tmp_path, **flags)
    with pytest.raises(UserError, match=r"nowhere.yaml cannot be read"):
        build(tmp_path, train_file=["nowhere.yaml"])


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--train_file", "a", "--train_weight", "1", "--train_weight", "2"], "--train_weight is given 2 times and"),
        (["--train_weight", "1"], "--train_file 0 times: write one weight for each file"),
        (["--train_file", "a", "--train_weight", "0"], "--train_weight is 0.0: write a positive number"),
        (["--train_file", "a", "--train_weight", "-1"], "--train_weight is -1.0: write a positive number"),
        (["--shuffle_buffer", "5"], "--shuffle_buffer is for --streaming"),
        (["--streaming", "--train_file", "a"], "--streaming needs --max_steps"),
        (["--streaming", "--max_steps", "5"], "--streaming needs --train_file or --dataset_name"),
        (["--streaming", "--max_steps", "5", "--train_file", "m.yaml"], "a mixture does not go with --streaming"),
    ],
)
def test_flags_that_do_not_go_together(words, problem):
    with pytest.raises(UserError) as caught:
        parse_arguments(words)
    (line,) = caught.value.problems
    assert problem in line
