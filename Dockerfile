# One peer. docker build -t petals .                 for CPUs
#           docker build -t petals --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .   for NVIDIA cards
# docs/deploy.md says how to run it; tests/test_packaging.py runs its steps without an engine.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=quant
# fastecdsa, of libp2p, is the one package that is compiled.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential libgmp-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
RUN python -m venv /opt/petals
COPY constraints.txt ./
RUN /opt/petals/bin/pip install --no-cache-dir --index-url "${TORCH_INDEX}" -c constraints.txt torch
COPY . .
RUN /opt/petals/bin/pip install --no-cache-dir -c constraints.txt ".[${EXTRAS}]" \
    && /opt/petals/bin/python -m compileall -q /opt/petals/lib

FROM python:${PYTHON}-slim
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgmp10 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 petals \
    && install -d -o petals -g petals /data
COPY --from=build /opt/petals /opt/petals
USER 10001
WORKDIR /data
# Every flag may be set like this; what is given to `docker run` goes before it.
ENV PATH=/opt/petals/bin:$PATH \
    HF_HOME=/data/huggingface \
    PETALS_CACHE=/data/cache \
    PETALS_IDENTITY=/data/peer.key \
    PETALS_LISTEN=/ip4/0.0.0.0/tcp/31337
VOLUME /data
EXPOSE 31337 8000
STOPSIGNAL SIGTERM
# The first start fetches and loads blocks. Asks the port of PETALS_LISTEN.
HEALTHCHECK --interval=60s --timeout=30s --start-period=30m --retries=3 \
    CMD ["python", "-m", "petals.cli.healthcheck"]
ENTRYPOINT ["petals", "peer"]
CMD ["--serve"]
