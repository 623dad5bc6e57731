# docker build -t dstrain:cpu .
# docker build -t dstrain:cuda --build-arg DEVICE=cuda --build-arg EXTRAS=adapters,gpu .
# docker run --rm --shm-size 2g dstrain:cpu torchrun --nproc_per_node 2 dstrain/train.py --help
ARG DEVICE=cpu

FROM debian:bookworm-slim AS base-cpu
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu \
    DS_ACCELERATOR=cpu

# DeepSpeed compiles its ops at the first start, with nvcc: the CUDA of PyTorch's own wheels.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS base-cuda

# hadolint ignore=DL3006
FROM base-${DEVICE}
ARG EXTRAS=adapters
# The versions are the distribution's: it keeps only the newest of each.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libaio-dev openssh-client pdsh python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 dstrain \
    && install -d -o dstrain /workspace /workspace/runs /opt/venv
USER 10001
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /workspace
COPY --chown=dstrain pyproject.toml constraints.txt README.md LICENSE ./
COPY --chown=dstrain dstrain dstrain
COPY --chown=dstrain ds_configs ds_configs
COPY --chown=dstrain examples examples
RUN python3 -m venv /opt/venv \
    && pip install --no-cache-dir -c constraints.txt torch \
    && pip install --no-cache-dir -c constraints.txt -e ".[${EXTRAS}]"
CMD ["dstrain", "--help"]
