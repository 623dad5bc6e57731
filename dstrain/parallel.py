"""The rank grid: sizes of every kind of parallelism, where one rank stands in it, and what the launcher says of it.

Ranks are laid out as DeepSpeed lays them out: pipeline stage outermost, then data parallel, then sequence or tensor
parallel innermost (`PipeDataParallelTopology`, `initialize_sequence_parallel`, AutoTP's groups in deepspeed 0.19).
"""

import os
import socket
from dataclasses import dataclass

from dstrain.errors import UserError


@dataclass(frozen=True)
class ParallelDims:
    """Sizes of the parallel dimensions; `dp_size` is what the others leave of `world_size`."""

    world_size: int
    tp_size: int = 1
    pp_size: int = 1
    sp_size: int = 1

    def __post_init__(self):
        for key, size in (
            ("tensor_parallel.autotp_size", self.tp_size),
            ("pipeline.stages", self.pp_size),
            ("sequence_parallel_size", self.sp_size),
        ):
            if size < 1:
                raise UserError(f"{key} is {size}: write a positive number of ranks")
        if self.world_size % self.model_parallel_size:
            raise UserError(
                f"{self.world_size} processes cannot be split into tensor_parallel.autotp_size={self.tp_size} x "
                f"pipeline.stages={self.pp_size} x sequence_parallel_size={self.sp_size}: "
                f"start a multiple of {self.model_parallel_size} processes"
            )

    @property
    def model_parallel_size(self) -> int:
        """Ranks that share one sample."""
        return self.tp_size * self.pp_size * self.sp_size

    @property
    def dp_size(self) -> int:
        """Ranks groups that read different samples."""
        return self.world_size // self.model_parallel_size

    def gradient_ranks(self, zero_stage: int) -> int:
        """Ranks over which DeepSpeed averages gradients; over the others that share a replica it sums.

        Sequence-parallel ranks are summed over below stage 3 (deepspeed 0.19.8, engine.py:3884, stage_1_and_2.py:1508);
        the reduce-scatter of stage 3 averages over all (runtime/comm/coalesced_collectives.py:124).
        """
        return self.dp_size * (self.sp_size if zero_stage == 3 else 1)

    def dp_rank(self, rank: int) -> int:
        return rank // (self.tp_size * self.sp_size) % self.dp_size

    def tp_rank(self, rank: int) -> int:
        return rank % self.tp_size

    def sp_rank(self, rank: int) -> int:
        return rank // self.tp_size % self.sp_size

    def pp_rank(self, rank: int) -> int:
        """The pipeline stage of this rank."""
        return rank // (self.tp_size * self.sp_size * self.dp_size)


@dataclass(frozen=True)
class PipePlacement:
    """Which stages each pipeline rank holds: one; folded (DualPipeV), two, of which the second is as far from the end
    as the first is from the beginning, so that the first rank has both ends of the model."""

    pp_size: int
    folded: bool = False

    @property
    def num_stages(self) -> int:
        return self.pp_size * (2 if self.folded else 1)

    def stages(self, pp_rank: int) -> tuple[int, ...]:
        """In the order in which a sample meets them."""
        return (pp_rank, self.num_stages - 1 - pp_rank) if self.folded else (pp_rank,)

    def pp_rank(self, stage: int) -> int:
        return min(stage, self.num_stages - 1 - stage) if self.folded else stage


def free_port() -> int:
    """A port of this host that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _of_open_mpi() -> dict[str, str]:
    """What mpirun has set, by torchrun's names; {} for a process that it has not started."""
    prefix = "OMPI_COMM_WORLD_"
    names = {"RANK": "RANK", "LOCAL_RANK": "LOCAL_RANK", "WORLD_SIZE": "SIZE", "LOCAL_WORLD_SIZE": "LOCAL_SIZE"}
    return {own: os.environ[prefix + name] for own, name in names.items() if prefix + name in os.environ}


def check_master_port() -> None:
    """Refuse, on rank 0, a MASTER_PORT that another process has: the other ranks would join that one's run.

    torchrun and accelerate listen on it themselves and look for a free one; the deepspeed launcher takes 29500 for
    every run. Raises UserError.
    """
    port, launched = os.environ.get("MASTER_PORT", "29500"), "RANK" in os.environ or _of_open_mpi()
    agent_has_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not launched or agent_has_it or not Launch.from_environment().is_main:
        return
    try:
        socket.create_server(("", int(port))).close()
    except OSError as error:
        raise UserError(
            f"port {port}, where the ranks are to meet, cannot be opened here ({os.strerror(error.errno or 0)}): does "
            f"another run use it? Add --master_port {free_port()} before the script (deepspeed, torchrun)"
        ) from None


@dataclass(frozen=True)
class Launch:
    """This process among all, as its launcher set the environment. Without one: a single process."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int  # processes on this host

    @classmethod
    def from_environment(cls) -> "Launch":
        names = os.environ if "RANK" in os.environ else {**os.environ, **_of_open_mpi()}
        world_size = names.get("WORLD_SIZE", "1")
        return cls(
            rank=int(names.get("RANK", 0)),
            local_rank=int(names.get("LOCAL_RANK", 0)),
            world_size=int(world_size),
            # torchrun's name, then the deepspeed launcher's; without either as if there were one host
            local_world_size=int(names.get("LOCAL_WORLD_SIZE", names.get("LOCAL_SIZE", world_size))),
        )

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_main_on_host(self) -> bool:
        return self.local_rank == 0
