"""A training loop of one's own from dstrain's parts; with the same flags it has the losses of dstrain/train.py.

    torchrun --nproc_per_node 2 examples/own_loop.py --deepspeed_config ds_configs/zero2.json \
      --config_name examples/llama_10m.json --block_size 128 --max_steps 10
"""

import json

import torch

import dstrain

args = dstrain.parse_arguments()
seed, steps = args.run.seed, args.run.max_steps
launch = dstrain.init_distributed()
config = dstrain.load_config(args.run.deepspeed_config)
resolved = dstrain.resolve_config(config, world_size=launch.world_size, overrides=args.run.set).with_total_steps(steps)
tokenizer = dstrain.build_tokenizer(args.model.tokenizer_name or "bytes")
one_per_host = {"is_main_per_host": launch.is_main_on_host, "barrier": torch.distributed.barrier}
data = dstrain.build_data(args.data, tokenizer, seed=seed, block_size=args.data.block_size or 512, **one_per_host)
model = dstrain.build_model(
    args.model,
    dstrain.load_model_config(args.model),
    seed=seed,
    dtype={"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[resolved.precision],
    zero3_config=resolved.deepspeed if resolved.zero_stage == 3 else None,
)
engine = dstrain.build_engine(model, resolved)
part = {"dp_rank": resolved.parallel.dp_rank(launch.rank), "dp_size": resolved.parallel.dp_size}
batches = {"global_batch": resolved.global_batch, "micro_batch": resolved.micro_batch}
with dstrain.build_loader(data.train, seed=seed, **batches, **part) as loader:
    for step in range(1, steps + 1):
        result = engine.train_batch(next(loader))
        if launch.is_main:
            print(json.dumps({"step": step, "loss": float(result.loss), "learning_rate": result.learning_rate}))
