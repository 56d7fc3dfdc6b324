# syntax=docker/dockerfile:1
# An image that serves a model: what `make setup` makes, and nothing else. See docs/deployment.md.
#
#   docker build -t hymba .                                          # PyTorch as PyPI has it: runs on CUDA GPUs and on CPUs
#   docker build -t hymba --build-arg TORCH_INDEX=<index> .          # PyTorch from another index, such as that of CPU builds: smaller
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ make && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY . .
ARG TORCH_INDEX=""
# The kernels are compiled for every level of instructions here and chosen where the container runs.
RUN PIP_EXTRA_INDEX_URL="${TORCH_INDEX}" PIP_NO_CACHE_DIR=1 make setup

FROM python:${PYTHON}-slim
# On a GPU, Triton compiles the launchers of its kernels with gcc.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev libstdc++6 && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 hymba \
    && install -d -o hymba -g hymba /models
COPY --from=build /app /app
ENV PATH=/app/.venv/bin:$PATH \
    HF_HOME=/models \
    TRITON_CACHE_DIR=/models/.triton \
    TORCHINDUCTOR_CACHE_DIR=/models/.inductor \
    PYTHONUNBUFFERED=1
USER 1000
WORKDIR /home/hymba
VOLUME /models
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=5m --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["hymba", "serve", "--host", "0.0.0.0", "--port", "8000"]
