"""Chats through chat templates: for every token, whether it carries loss, against tables written out by hand."""

import itertools
import json

import numpy as np
import pytest

from dstrain.data.columns import ColumnFlags
from dstrain.data.segments import RowRules
from dstrain.data.sources import FileSource
from dstrain.data.store import TokenStore, write_store
from dstrain.data.tokenization import TextEncoder, build_tokenizer
from dstrain.errors import UserError

# As SmolLM2's, with a system message of its own where there is none.
CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Llama 3's: contents are trimmed, and nothing stands behind the end of a turn.
LLAMA3 = (
    "{{ '<s>' }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|end|>\n\n' + m['content'] | trim + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
# As Llama 2's and Mistral's: no generation prompt, and roles that must alternate.
INST = (
    "{% set system = '' %}{% set rest = messages %}{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>' + messages[0]['content'] + '<</SYS>>' %}{% set rest = messages[1:] %}{% endif %}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ '<s>[INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' </s>' }}{% endif %}{% endfor %}"
)
# As Qwen 3's: thoughts of earlier turns are dropped, and the last turn has some, empty if need be.
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<think>' }}{% if '</think>' in m['content'] %}{{ m['content'].split('</think>')[0] }}{% endif %}"
    "{{ '</think>' }}{% endif %}"
    "{{ m['content'].split('</think>')[-1] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "inst": INST, "qwen3": QWEN3}
SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>", "<think>", "</think>"]

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Olé, you"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "count</think>4"},
]
SHAPES = {
    "openai": {"id": 7, "messages": CHAT},
    "sharegpt": {
        "id": "a",
        "conversations": [
            {"from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"]), "value": m["content"]}
            for m in CHAT
        ],
    },
    "prompt": {"prompt": CHAT[:4], "completion": CHAT[4:]},
}
# (text, does it carry loss) of each document, end to end; in the shape `prompt` only the last answer does.
_SYSTEM, _HI = "<|im_start|>system\nBe kind.<|im_end|>\n", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
_SUM = "\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
WHOLE = {
    "chatml": [
        [
            (_SYSTEM + _HI, False),
            ("Olé, you<|im_end|>", True),
            (_SUM, False),
            ("count</think>4<|im_end|>", True),
            ("\n", False),
        ]
    ],
    "llama3": [
        [
            ("<s><|start|>system<|end|>\n\nBe kind.<|eot|><|start|>user<|end|>\n\nHi<|eot|>", False),
            ("<|start|>assistant<|end|>\n\n", False),
            ("Olé, you<|eot|>", True),
            ("<|start|>user<|end|>\n\n2+2?<|eot|><|start|>assistant<|end|>\n\n", False),
            ("count</think>4<|eot|>", True),
        ]
    ],
    "inst": [
        [
            ("<s>[INST] <<SYS>>Be kind.<</SYS>>Hi [/INST]", False),
            (" Olé, you </s>", True),
            ("<s>[INST] 2+2? [/INST]", False),
            (" count</think>4 </s>", True),
        ]
    ],
    "qwen3": [
        [(_SYSTEM + _HI, False), ("<think></think>Olé, you<|im_end|>", True), ("\n", False)],
        [
            (_SYSTEM + _HI, False),
            ("Olé, you<|im_end|>", False),
            (_SUM, False),
            ("<think>count</think>4<|im_end|>", True),
            ("\n", False),
        ],
    ],
}
LAST_ONLY = {
    "chatml": [
        [
            (_SYSTEM + _HI + "Olé, you<|im_end|>" + _SUM, False),
            ("count</think>4<|im_end|>", True),
            ("\n", False),
        ]
    ],
    "llama3": [
        [
            ("<s><|start|>system<|end|>\n\nBe kind.<|eot|><|start|>user<|end|>\n\nHi<|eot|>", False),
            ("<|start|>assistant<|end|>\n\nOlé, you<|eot|>", False),
            ("<|start|>user<|end|>\n\n2+2?<|eot|><|start|>assistant<|end|>\n\n", False),
            ("count</think>4<|eot|>", True),
        ]
    ],
    "inst": [
        [
            ("<s>[INST] <<SYS>>Be kind.<</SYS>>Hi [/INST] Olé, you </s><s>[INST] 2+2? [/INST]", False),
            (" count</think>4 </s>", True),
        ]
    ],
    "qwen3": [
        [
            (_SYSTEM + _HI + "Olé, you<|im_end|>" + _SUM, False),
            ("<think>count</think>4<|im_end|>", True),
            ("\n", False),
        ],
    ],
}
TABLE = [
    (template, shape, (LAST_ONLY if shape == "prompt" else WHOLE)[template])
    for template in TEMPLATES
    for shape in SHAPES
]


@pytest.fixture(scope="module")
def bpe():
    """A byte-level BPE like those of the models, with their special tokens, that merges where it can."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.decoder = decoders.ByteLevel()
    texts = [text for documents in WHOLE.values() for pieces in documents for text, _ in pieces]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        min_frequency=1,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def make_store(folder, tokenizer, template, row, rules=RowRules()):  # noqa: B008 - frozen
    tokenizer.chat_template = template
    folder.mkdir(exist_ok=True)
    file = folder / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    write_store(folder, FileSource([file], ColumnFlags(), None, folder), TextEncoder(tokenizer), rules)
    return TokenStore.open(folder)


def read(store):
    """(ids, carries loss) of each document."""
    carries = store.carries_loss if store.carries_loss is not None else np.ones(len(store.tokens), bool)
    return [(store.tokens[a:b].tolist(), carries[a:b].tolist()) for a, b in itertools.pairwise(store.offsets.tolist())]


def losses(pieces):
    """Whether each byte of the pieces' text carries loss."""
    return [loss for text, loss in pieces for _ in text.encode()]


@pytest.mark.parametrize(("template", "shape", "documents"), TABLE, ids=[f"{t}-{s}" for t, s, _ in TABLE])
def test_every_token_of_a_chat(tmp_path, template, shape, documents):
    """A token a byte: the table is the answer."""
    store = make_store(tmp_path, build_tokenizer("bytes"), TEMPLATES[template], SHAPES[shape])
    assert read(store) == [(list("".join(text for text, _ in pieces).encode()), losses(pieces)) for pieces in documents]
    assert store.is_rows


@pytest.mark.parametrize(("template", "shape", "documents"), TABLE, ids=[f"{t}-{s}" for t, s, _ in TABLE])
def test_tokens_of_several_bytes_belong_to_where_they_begin(tmp_path, bpe, template, shape, documents):
    """Where a token begins is found from the bytes that it stands for, not from the tokenizer's own offsets."""
    store = make_store(tmp_path, bpe, TEMPLATES[template], SHAPES[shape])
    for (ids, carries), pieces in zip(read(store), documents, strict=True):
        expected, text, at = losses(pieces), "".join(text for text, _ in pieces), 0
        if template != "qwen3":
            assert ids == bpe.apply_chat_template(CHAT, return_dict=False)
        assert ids == bpe(text, add_special_tokens=False)["input_ids"]
        for token, loss in zip(bpe.convert_ids_to_tokens(ids), carries, strict=True):
            assert loss == expected[at], (token, text.encode()[:at])
            # A byte-level token stands for as many bytes as it has characters.
            at += len(token)
        assert at == len(expected)
    assert len(ids) < len(text.encode()) / 2


def test_a_space_of_the_prompt_that_joins_the_answer(tmp_path, bpe):
    """The token " Olé" begins in the prompt, which is what the model gets at inference: it cannot be its to write."""
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    ((ids, carries),) = read(make_store(tmp_path, bpe, template, {"messages": CHAT[1:3]}))
    tokens = bpe.convert_ids_to_tokens(ids)
    first = carries.index(True)
    assert tokens[first - 1][0] == "Ġ"
    assert len(tokens[first - 1]) > 1
    assert carries[first:] == [True] * (len(ids) - first)
    assert tokens[-1] == "</s>"


GENERATION = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '</s>' }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)
WHITE_END = (
    "{% for m in messages %}{{ m['role'] + '> ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant> ' }}{% endif %}"
)
_PAIR = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]


@pytest.mark.parametrize(
    ("template", "row", "pieces"),
    [
        (GENERATION, {"messages": _PAIR}, [("<|user|>Hi<|assistant|>", False), ("Yes</s>", True)]),
        (
            GENERATION,
            {"prompt": [*_PAIR, _PAIR[0]], "completion": _PAIR[1:]},
            [("<|user|>Hi<|assistant|>Yes</s><|user|>Hi<|assistant|>", False), ("Yes</s>", True)],
        ),
        (WHITE_END, {"messages": _PAIR}, [("user> Hi\nassistant> ", False), ("Yes\n", True)]),
        (
            CHATML,
            {"messages": [_PAIR[0], {"role": "assistant", "content": ""}]},
            [("<|im_start|>system\nBe brief.<|im_end|>\n" + _HI, False), ("<|im_end|>", True), ("\n", False)],
        ),
        (  # what follows the last answer carries none
            CHATML,
            {"messages": [CHAT[0], *_PAIR, _PAIR[0]]},
            [
                (_SYSTEM + _HI, False),
                ("Yes<|im_end|>", True),
                ("\n<|im_start|>user\nHi<|im_end|>\n", False),
            ],
        ),
    ],
    ids=["generation", "generation-prompt", "white-end", "empty-answer", "user-last"],
)
def test_ends_of_answers(tmp_path, template, row, pieces):
    store = make_store(tmp_path, build_tokenizer("bytes"), template, row)
    assert read(store) == [(list("".join(text for text, _ in pieces).encode()), losses(pieces))]


@pytest.mark.parametrize("template", TEMPLATES)
def test_train_on_prompts_is_the_whole_chat(tmp_path, template):
    tokenizer = build_tokenizer("bytes")
    store = make_store(tmp_path, tokenizer, TEMPLATES[template], SHAPES["openai"], RowRules(train_on_prompts=True))
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert read(store) == [(list(text.encode()), [True] * len(text.encode()))]
    assert store.carries_loss is None
    assert store.is_rows


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the tokenizer has no chat template: give one with --chat_template FILE"),
        ("{% for m in messages %}", r"the chat template is no Jinja \(line 1: Unexpected end of template"),
        (
            "{{ messages[0]['name'] + 'x' }}",
            r"rows.jsonl:1 is refused by the chat template \(.*has no attribute 'name'",
        ),
        (INST + "{% if add_generation_prompt %}?{% endif %}", "in another way than it shows"),
        (INST.replace("m['content'] + ' </s>'", "' </s>'"), r"rows\.jsonl:1: the chat template leaves the answer out"),
        (INST.replace(" + ' </s>'", ""), "writes nothing behind an answer"),
    ],
)
def test_templates_that_cannot_be_used(tmp_path, template, message):
    with pytest.raises(UserError, match=message) as caught:
        make_store(tmp_path, build_tokenizer("bytes"), template, SHAPES["openai"])
    assert "\n" not in str(caught.value)


def test_roles_that_the_template_refuses_are_bad_rows(tmp_path):
    row = {"messages": [CHAT[1], *CHAT[1:3]]}
    with pytest.raises(UserError, match=r"rows\.jsonl:1 is refused by the chat template \(roles must alternate\)"):
        make_store(tmp_path, build_tokenizer("bytes"), INST, row)


def test_a_tokenizer_without_offsets_is_refused(tmp_path):
    class Slow:
        eos_token_id, chat_template = 0, CHATML

        def __call__(self, text, **_):
            return {"input_ids": [list(t.encode()) for t in text] if isinstance(text, list) else list(text.encode())}

        def get_vocab(self):
            return {"a": 255}

    with pytest.raises(UserError, match="chats need a tokenizer of the tokenizers library"):
        make_store(tmp_path, Slow(), CHATML, SHAPES["openai"])


def test_the_template_may_be_a_file_and_is_saved_with_the_tokenizer(tmp_path):
    (tmp_path / "t.jinja").write_text(CHATML)
    from_file, from_text = (build_tokenizer("bytes", chat_template=t) for t in (str(tmp_path / "t.jinja"), CHATML))
    assert from_file.chat_template == from_text.chat_template == CHATML
    from_file.save_pretrained(tmp_path / "saved")
    assert build_tokenizer(str(tmp_path / "saved")).chat_template == CHATML
    assert TextEncoder(from_file).sha256 != TextEncoder(build_tokenizer("bytes")).sha256
    with pytest.raises(UserError, match=r"--chat_template .*no\.jinja cannot be read \(No such file"):
        build_tokenizer("bytes", chat_template=str(tmp_path / "no.jinja"))


def test_real_chats(shared_data, tmp_path):
    """SmolLM2's own tokenizer and template on 500 conversations: the ids are transformers', the loss is the answers."""
    tokenizer = build_tokenizer(str(shared_data / "tokenizers/smollm2"))
    file = shared_data / "fastchat_dummy_conversation.json"
    write_store(tmp_path, FileSource([file], ColumnFlags(), None, tmp_path), TextEncoder(tokenizer), RowRules())
    rows = json.loads(file.read_text())
    documents = read(TokenStore.open(tmp_path))
    assert len(documents) == len(rows) == 500
    roles = {"human": "user", "gpt": "assistant"}
    for row, (ids, carries) in zip(rows, documents, strict=True):
        messages = [{"role": roles[m["from"]], "content": m["value"]} for m in row["conversations"]]
        assert ids == tokenizer.apply_chat_template(messages, return_dict=False)
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        learnt = tokenizer.decode([i for i, loss in zip(ids, carries, strict=True) if loss])
        assert learnt == "".join(f"{answer}<|im_end|>" for answer in answers)
