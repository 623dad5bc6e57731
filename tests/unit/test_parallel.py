"""The rank grid against DeepSpeed's own topologies, and the launcher's variables."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.errors import UserError
from dstrain.parallel import Launch, ParallelDims, PipePlacement

sizes = st.integers(1, 4)


@given(dp=sizes, tp=sizes, pp=sizes, sp=sizes)
def test_coordinates_are_a_bijection(dp, tp, pp, sp):
    dims = ParallelDims(dp * tp * pp * sp, tp_size=tp, pp_size=pp, sp_size=sp)
    assert (dims.dp_size, dims.model_parallel_size) == (dp, tp * pp * sp)
    places = {(dims.pp_rank(r), dims.dp_rank(r), dims.sp_rank(r), dims.tp_rank(r)) for r in range(dims.world_size)}
    assert places == {(p, d, s, t) for p in range(pp) for d in range(dp) for s in range(sp) for t in range(tp)}


@given(dp=sizes, tp=sizes, pp=sizes)
def test_pipeline_layout_is_deepspeeds(dp, tp, pp):
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    topology = PipeModelDataParallelTopology(num_pp=pp, num_mp=tp, num_dp=dp)
    dims = ParallelDims(dp * tp * pp, tp_size=tp, pp_size=pp)
    for rank in range(dims.world_size):
        place = topology.get_coord(rank)
        assert (place.pipe, place.data, place.model) == (dims.pp_rank(rank), dims.dp_rank(rank), dims.tp_rank(rank))


@pytest.mark.parametrize("kind", ["tp_size", "sp_size"])
def test_tensor_and_sequence_groups_are_neighbours(kind):
    """AutoTP's mesh is (data, tensor); Ulysses' groups are `range(i * sp, (i + 1) * sp)` (deepspeed 0.19.8)."""
    dims = ParallelDims(8, **{kind: 2})
    assert [dims.dp_rank(rank) for rank in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    inner = dims.tp_rank if kind == "tp_size" else dims.sp_rank
    assert [inner(rank) for rank in range(8)] == [0, 1] * 4


@pytest.mark.parametrize(
    ("world_size", "degrees", "line"),
    [
        (3, {"tp_size": 2}, "3 processes cannot be split into tensor_parallel.autotp_size=2 x pipeline.stages=1"),
        (4, {"pp_size": 2, "sp_size": 4}, "start a multiple of 8 processes"),
        (4, {"pp_size": 0}, "pipeline.stages is 0: write a positive number of ranks"),
        (4, {"sp_size": -1}, "sequence_parallel_size is -1"),
    ],
)
def test_what_does_not_divide_is_refused(world_size, degrees, line):
    with pytest.raises(UserError) as refused:
        ParallelDims(world_size, **degrees)
    assert line in refused.value.problems[0]
    assert len(refused.value.problems) == 1


def test_launch_from_the_environment(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    alone = Launch.from_environment()
    assert alone == Launch(rank=0, local_rank=0, world_size=1, local_world_size=1)
    assert alone.is_main
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "8")
    other = Launch.from_environment()
    assert other == Launch(rank=5, local_rank=1, world_size=8, local_world_size=8)
    assert not other.is_main
    assert not other.is_main_on_host


def test_launch_by_mpirun(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "3", "LOCAL_RANK": "1", "SIZE": "4", "LOCAL_SIZE": "2"}.items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    assert Launch.from_environment() == Launch(rank=3, local_rank=1, world_size=4, local_world_size=2)
    monkeypatch.setenv("RANK", "0")  # a launcher inside mpirun's process
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert Launch.from_environment().world_size == 1


@pytest.mark.parametrize("folded", [False, True])
def test_every_stage_is_on_one_rank(folded):
    placement = PipePlacement(3, folded)
    held = {stage: rank for rank in range(3) for stage in placement.stages(rank)}
    assert sorted(held) == list(range(placement.num_stages))
    assert all(placement.pp_rank(stage) == rank for stage, rank in held.items())
    assert placement.pp_rank(placement.num_stages - 1) == (0 if folded else 2)
