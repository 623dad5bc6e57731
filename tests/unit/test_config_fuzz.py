"""Any JSON whatever either resolves or is refused in words; it never crashes, and what resolves resolves again."""

from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.config import RunFacts, resolve_config
from dstrain.config import schema_keys as keys
from dstrain.config.schema_types import CLASSES, DEEPSPEED_OPTIMIZERS, SCHEDULERS, TORCH_OPTIMIZERS
from dstrain.errors import UserError

ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["auto", "cpu", "", "1", "fp32"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from([*DEEPSPEED_OPTIMIZERS, *TORCH_OPTIMIZERS, "sgd", "OneBitAdam"])
PARAMS = sorted({name for cls in CLASSES.values() for name in cls.params} | {"adam_w_mode", "torch_adam"})
SCHEDULE_PARAMS = sorted({name for params in SCHEDULERS.values() for name in params})


def value_of(key):
    """Mostly values of the right kind, so that the rules are reached."""
    right = {
        "bool": st.booleans(),
        "int": st.integers(-1, 9) | st.just(5e8),
        "number": st.floats(-1, 4),
        "text": st.sampled_from(key.choices or ("a", "/tmp")),
        "list": st.lists(st.floats(0, 1), max_size=3),
        "any": ANY,
        "free": st.dictionaries(st.text(max_size=3), ANY, max_size=2),
        "block": blocks(key.keys) if key.kind == "block" else st.nothing(),
    }[key.kind]
    return st.one_of(right, right, right, right, ANY)


def blocks(block):
    return st.lists(st.sampled_from(sorted(block)), max_size=4, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: value_of(block[name]) for name in names})
    )


OPTIMIZERS = st.fixed_dictionaries(
    {"type": NAMES, "params": st.dictionaries(st.sampled_from(PARAMS), st.floats(0, 1) | ANY, max_size=3)}
)
SCHEDULES = st.fixed_dictionaries(
    {
        "type": st.sampled_from(sorted(SCHEDULERS)),
        "params": st.dictionaries(st.sampled_from(SCHEDULE_PARAMS), st.integers(1, 9) | ANY, max_size=3),
    }
)
CONFIGS = st.builds(
    lambda rest, optimizer, schedule: {"train_batch_size": 8, "optimizer": optimizer, "scheduler": schedule, **rest},
    blocks(keys.TOP),
    OPTIMIZERS,
    SCHEDULES,
)
FACTS = st.builds(
    RunFacts,
    gradient_checkpointing=st.booleans(),
    compile=st.booleans(),
    device=st.sampled_from([None, "cpu", "cuda"]),
    hidden_size=st.sampled_from([None, 64]),
    total_steps=st.sampled_from([None, 100]),
    config_only=st.booleans(),
)


def resolve(config, **world):
    """(the configuration or None, the problems)."""
    try:
        return resolve_config(config, **world), []
    except UserError as refusal:
        return None, refusal.problems


@settings(max_examples=600, deadline=None)
@given(CONFIGS, FACTS, st.sampled_from([1, 2, 4]))
def test_resolves_or_is_refused_in_words(config, facts, world_size):
    resolved, problems = resolve(config, world_size=world_size, facts=facts)
    assert all(problem and "\n" not in problem for problem in problems)
    if resolved:
        again = resolved.with_facts()
        assert again.deepspeed == resolved.deepspeed
        assert again.origins == resolved.origins


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(keys.TOP)) | st.text(max_size=4), ANY, max_size=4))
def test_nonsense_is_refused_in_words(config):
    _, problems = resolve(config, world_size=2)
    assert all(problem and "\n" not in problem for problem in problems)
