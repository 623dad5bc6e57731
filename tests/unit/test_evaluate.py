"""`dstrain evaluate`: its figures against ones that are computed in another way, and what it refuses."""

import json
import math
import tempfile

import pytest
import torch

from dstrain import cli
from dstrain.errors import UserError
from dstrain.evaluate.classification import choose, encode_labels, find_labels, score_batch
from dstrain.evaluate.metrics import classification_metrics, group_metrics, text_metrics
from dstrain.generate.model import load
from tests import tiny_model
from tests.checkpoints import written_by_two_ranks
from tests.tiny_model import END, POSITIONS

REVIEWS = [
    ("a fine film, and long", " good"),
    ("bad", " bad"),
    ("no", " bad"),
    ("what a joy it was to see them again, all of them, after so many years away", " good"),
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model.save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def reviews(tmp_path):
    path = tmp_path / "reviews.jsonl"
    rows = ({"prompt": f"{text}\nSay:", "completion": label} for text, label in REVIEWS)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def evaluate(capfd):
    """The command's table and JSON."""

    def run(*argv):
        assert cli.main(["evaluate", *map(str, argv)]) == 0
        lines = capfd.readouterr().out.splitlines()
        return "\n".join(lines[:-1]), json.loads(lines[-1])

    return run


def refusal(capfd, *argv):
    assert cli.main(["evaluate", *map(str, argv)]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert all(line.startswith("dstrain: error: ") for line in err.splitlines())
    return err


def test_perplexity_of_a_checkpoint_is_that_of_a_plain_forward(tmp_path, evaluate, monkeypatch):
    """Blocks of the trained size, over documents that end with an end of text, as in training's own evaluation."""
    documents = ["one two three four five six, " * 4, "Grüße: sieben acht neun zehn " * 3]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    model, block = tiny_model.build(), 32
    checkpoint = written_by_two_ranks(tmp_path, model, identity={"block_size": block})
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    flags = ("--task", "perplexity", "--data_file", tmp_path / "text.jsonl")
    table, found = evaluate(tmp_path, *flags, "--batch_size", "3", "--output", tmp_path / "result.json")

    ids = [token for text in documents for token in [*text.encode(), END]]
    blocks = torch.tensor(ids[: len(ids) // block * block]).view(-1, block)
    with torch.no_grad():
        logits = model(blocks).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), blocks[:, 1:].flatten()).item()
    metrics = found["metrics"]
    assert metrics["loss"] == pytest.approx(loss, rel=1e-6)
    assert metrics["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    num_bytes = sum(len(text.encode()) for text in documents)
    assert metrics["bits_per_byte"] == pytest.approx(loss / math.log(2) * len(ids) / num_bytes, rel=1e-6)
    assert found["settings"]["tokens"] == blocks[:, 1:].numel()
    assert found["model"] == str(checkpoint)
    assert f"{loss:.4f}" in table
    assert json.loads((tmp_path / "result.json").read_text()) == found
    assert not list((tmp_path / "scratch").iterdir())  # the export is gone
    one_by_one = evaluate(checkpoint, *flags, "--batch_size", "1")[1]["metrics"]
    assert one_by_one["loss"] == pytest.approx(metrics["loss"], rel=1e-6)


@pytest.mark.parametrize("labels", [["b", "g"], [" bad", " good"], [" g", " go"]])
def test_scores_are_those_of_a_plain_forward(folder, labels):
    loaded = load(str(folder))
    encoded = encode_labels(loaded, labels)
    prompts = loaded.encode_prompts([text for text, _ in REVIEWS])
    calls = []
    handle = loaded.model.register_forward_hook(lambda module, inputs, output: calls.append(output.logits.shape))
    scores = score_batch(loaded.model, prompts, encoded.ids)
    handle.remove()
    end = [END] if labels == [" g", " go"] else []  # only the end tells " g" from " go"
    for prompt, row in zip(prompts, scores, strict=True):
        expected = [tiny_model.log_likelihood(loaded.model, prompt, [*label.encode(), *end]) for label in labels]
        assert row == pytest.approx(expected, rel=1e-5)
    # Labels of one token are read in one go, and logits are computed only from the end of the shortest prompt on.
    assert len(calls) == 1
    assert calls[0][0] == len(prompts) * (1 if labels == ["b", "g"] else 2)
    assert calls[0][1] <= max(map(len, prompts)) - min(map(len, prompts)) + 1 + 4


def test_the_length_of_a_label_counts_unless_normalized(folder):
    labels = encode_labels(load(str(folder)), ["aaaa", "b"])
    assert choose([[-8.0, -3.0]], labels, length_normalized=False) == ["b"]
    assert choose([[-8.0, -3.0]], labels, length_normalized=True) == ["aaaa"]


def test_classification(folder, reviews, tmp_path, evaluate):
    """Prompts that are too long lose their own beginning, not the words that all of them end with."""
    flags = ("--task", "classification", "--data_file", reviews, "--max_length", "40")
    predictions = tmp_path / "predictions.jsonl"
    table, found = evaluate(folder, *flags, "--predictions", predictions, "--positive_label", " bad")
    rows = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert [row["gold"] for row in rows] == [label for _, label in REVIEWS]
    assert [row["prompt_cut"] for row in rows] == [False, False, False, True]
    loaded = load(str(folder))
    for row, (text, _) in zip(rows, REVIEWS, strict=True):
        prompt = list(f"{text}\nSay:".encode())[-(40 - len(" good")) :]
        scores = {t: tiny_model.log_likelihood(loaded.model, prompt, list(t.encode())) for t in (" bad", " good")}
        assert row["log_likelihoods"] == pytest.approx(scores, rel=1e-5)
        assert row["predicted"] == max(scores, key=scores.get)
    right = sum(row["gold"] == row["predicted"] for row in rows)
    assert found["metrics"]["accuracy"] == right / 4
    assert found["metrics"]["positive_label"] == " bad"
    assert found["settings"] | {"num_cut": 1, "num_rows": 4, "labels": [" bad", " good"]} == found["settings"]
    assert len(found["data"][0]["sha256"]) == 64
    assert {"scikit-learn", "torch"} <= found["versions"].keys()
    assert "num_cut 1" in table
    assert "' bad'" in table
    again = evaluate(folder, *flags, "--batch_size", "1", "--positive_label", " bad")[1]
    assert again["metrics"] == found["metrics"]


def test_classification_figures_by_hand():
    """Of four rows with three positives, two are found and none is invented."""
    found = classification_metrics(["n", "p", "p", "p"], ["n", "p", "n", "p"], ["n", "p"], "p")
    assert found["accuracy"] == 3 / 4
    assert (found["precision"], found["recall"], found["f1"]) == pytest.approx((1, 2 / 3, 4 / 5))
    assert found["by_label"]["n"] == pytest.approx({"precision": 1 / 2, "recall": 1, "f1": 2 / 3, "rows": 1})
    assert (found["macro_precision"], found["macro_recall"]) == pytest.approx((3 / 4, 5 / 6))
    assert found["macro_f1"] == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert found["confusion_matrix"] == [[1, 0], [1, 2]]


def test_figures_of_groups_by_hand():
    golds, given, groups = list("nnnppppn"), list("npnppnpp"), list("aaaaabbc")
    a, b, c = (group_metrics(golds, given, groups, ["n", "p"], "p")[name] for name in "abc")
    assert a == {"rows": 5, "accuracy": 0.8, "false_positive_rate": pytest.approx(1 / 3), "false_negative_rate": 0.0}
    assert b == {"rows": 2, "accuracy": 0.5, "false_positive_rate": None, "false_negative_rate": 0.5}
    assert c == {"rows": 1, "accuracy": 0.0, "false_positive_rate": 1.0, "false_negative_rate": None}
    of_three = group_metrics(["n", "q"], ["n", "p"], ["a", "a"], ["n", "p", "q"], "q")
    assert of_three == {"a": {"rows": 2, "accuracy": 0.5}}


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_error_rates_of_groups(suffix, folder, tmp_path, evaluate, capfd):
    """The groups are a column of the rows that are judged; rows that are left out are in none."""
    import pandas

    file = tmp_path / f"rows.{suffix}"
    table = pandas.DataFrame([*REVIEWS, ("left out", "")], columns=["prompt", "completion"])
    table["from"] = ["here", "there", "there", "here", "nowhere"]
    table["id"] = range(5)
    writers = {
        "jsonl": lambda: table.to_json(file, orient="records", lines=True),
        "parquet": lambda: table.to_parquet(file),
    }
    writers.get(suffix, lambda: table.to_csv(file, index=False))()
    flags = [folder, "--task", "classification", "--data_file", file]
    shown, found = evaluate(*flags, "--group_column", "from")
    by_group, whole = found["metrics"]["by_group"], found["metrics"]
    assert {group: figures["rows"] for group, figures in by_group.items()} == {"here": 2, "there": 2}
    assert whole["accuracy"] == (by_group["here"]["accuracy"] + by_group["there"]["accuracy"]) / 2
    (bad_as_good, bad), good = whole["confusion_matrix"][0][::-1], whole["confusion_matrix"][1]
    assert by_group["there"]["false_positive_rate"] == bad_as_good / (bad + bad_as_good)
    assert by_group["here"]["false_negative_rate"] == good[0] / 2
    assert "rows by from" in shown and "false negative rate" in shown
    assert "has no column form" in refusal(capfd, *flags, "--group_column", "form")
    assert "by_group" not in evaluate(*flags)[1]["metrics"]


def test_text_figures_by_hand():
    """BLEU: the geometric mean of 4/5, 3/4, 2/3, 1/2. chrF: the mean of 4/5, 3/4, 2/3, 1/2 and 0 (n = 1 to 5)."""
    names = ("bleu", "chrf", "rouge", "exact_match")
    figures, signatures = text_metrics([" a b c d e\n"], ["a b c d f"], names, None)
    assert figures["bleu"] == pytest.approx(100 * 0.2**0.25)
    assert (figures["rouge1"], figures["rouge2"], figures["rougeL"]) == pytest.approx((80, 75, 80))
    assert figures["exact_match"] == 0
    assert signatures["bleu"].startswith("nrefs:1|case:mixed")
    mean = (4 / 5 + 3 / 4 + 2 / 3 + 1 / 2 + 0) / 5
    assert text_metrics(["abcde"], ["abcdf"], ["chrf"], None)[0] == {"chrf": pytest.approx(100 * mean)}
    gsm8k = r"#### (\S+)"
    matched, _ = text_metrics(["so 3 + 4 #### 7\n#### 8", "it is 7"], ["#### 7", "#### 7"], ["exact_match"], gsm8k)
    assert matched == {"exact_match": 0.5}
    with pytest.raises(UserError, match="matches nothing in the completion of row 2"):
        text_metrics(["a", "b"], ["#### 1", "2"], ["exact_match"], gsm8k)


def test_generation_metrics_are_of_the_greedy_texts(folder, reviews, evaluate, tmp_path):
    flags = ("--task", "generation", "--data_file", reviews, "--max_new_tokens", "6", "--metrics", "exact_match,bleu")
    predictions = tmp_path / "predictions.jsonl"
    _, found = evaluate(folder, *flags, "--predictions", predictions, "--batch_size", "3")
    rows = [json.loads(line) for line in predictions.read_text().splitlines()]
    loaded = load(str(folder))
    for row in rows:
        ids = tiny_model.greedy(loaded.model, list(row["prompt"].encode())[-(POSITIONS - 6) :], 6)
        ids = ids[: ids.index(END)] if END in ids else ids
        assert row["prediction"] == loaded.tokenizer.decode(ids)
    assert [row["prompt_cut"] for row in rows] == [False, False, False, True]
    assert found["metrics"].keys() == {"bleu", "exact_match"}
    assert found["settings"]["signatures"]["bleu"].startswith("nrefs:1")


def test_rows_are_those_that_training_reads(folder, tmp_path, evaluate):
    """Templates over columns and chats; what the model sees is what it saw before the answer."""
    table = tmp_path / "table.jsonl"
    rows = [{"text": text, "label": int(label == " good")} for text, label in REVIEWS]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"text": "x"}\n')
    templates = ("--prompt_template", "{text}\\nSay:", "--completion_template", " {label:bad|good}")
    flags = ("--task", "classification", "--bad_rows", "skip")
    _, found = evaluate(folder, *flags, "--data_file", table, *templates, "--predictions", tmp_path / "a.jsonl")
    assert list(found["settings"]["skipped_rows"].values()) == [{"rows": 1, "first": [f"{table}:5"]}]
    chats = tmp_path / "chats.jsonl"
    turns = [[{"role": "user", "content": t}, {"role": "assistant", "content": label.strip()}] for t, label in REVIEWS]
    chats.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    turn = "{{ m.content }}{{ '\\nSay: ' if m.role == 'user' else '!' }}"
    template = "{% for m in messages %}" + turn + "{% endfor %}"
    chat = ("--data_file", chats, "--chat_template", template)
    evaluate(folder, *flags, *chat, "--predictions", tmp_path / "b.jsonl")
    for name, space in (("a", ""), ("b", " ")):
        scores = [json.loads(line)["log_likelihoods"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for (text, _), row in zip(REVIEWS, scores, strict=True):
            prompt = list(f"{text}\nSay:{space}".encode())[-(POSITIONS - 5 + len(space)) :]
            label = f"{'' if space else ' '}bad"
            expected = tiny_model.log_likelihood(tiny_model.build(), prompt, list(label.encode()))
            assert row[label] == pytest.approx(expected, rel=1e-5)


def test_labels_that_cannot_be_told_apart_are_refused(folder):
    assert find_labels([], ["b", "a", "b"]) == ["a", "b"]
    for named, golds, words in (
        (["a", "b"], ["a", "c"], "row 2 has 'c', which is none of the labels 'a', 'b'"),
        ([], ["a", "a"], "there is one label"),
        ([], [str(i) for i in range(101)], "101 different completions"),
    ):
        with pytest.raises(UserError, match=words):
            find_labels(named, golds)
    with pytest.raises(UserError, match="has no token"):
        encode_labels(load(str(folder)), ["a", ""])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--task", "sentiment"), "write perplexity, classification"),
        (("--task", "lm_eval"), "lm_eval:NAME"),
        (("--task", "perplexity"), "--data_file is missing"),
        (("--task", "perplexity", "--data_file", "x", "--labels", "a"), "--labels belongs to --task classification"),
        (("--task", "classification", "--data_file", "x", "--block_size", "8"), "--block_size belongs to"),
        (("--task", "generation", "--data_file", "x", "--metrics", "blue"), "write some of bleu,chrf"),
        (("--task", "generation", "--data_file", "x", "--answer_regex", "("), "no regular expression"),
        (("--task", "generation", "--data_file", "x", "--max_new_tokens", "0"), "write a positive number"),
        (("--task", "perplexity", "--data_file", "x", "--block_size", "1"), "smallest value is 2"),
        (("--task", "classification", "--data_file", "x", "--output", "/proc/none/x"), "there is no folder"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_loaded(flags, words, capfd):
    assert words in refusal(capfd, "no/such/model/anywhere", *flags)


def test_wrong_models_and_data_are_refused(folder, reviews, tmp_path, capfd):
    flags = ("--task", "classification", "--data_file", reviews)
    assert "neither a complete checkpoint nor a config.json" in refusal(capfd, tmp_path, *flags)
    assert "has 64 positions" in refusal(capfd, folder, *flags, "--max_length", "65")
    assert "leave no room for a prompt" in refusal(capfd, folder, *flags, "--max_length", "5")
    assert "matches no file" in refusal(capfd, folder, "--task", "perplexity", "--data_file", tmp_path / "none.txt")
    (tmp_path / "plain.txt").write_text("plain text")
    plain = ("--task", "generation", "--data_file", tmp_path / "plain.txt")
    assert "row 1 of --data_file is plain text" in refusal(capfd, folder, *plain)
