# syntax=docker/dockerfile:1
# The image that every step runs in on Vertex AI and Kubeflow: TFX 1.21 on Debian 13.
#
#   docker build -t tfx-vision .                                                        runs everything on CPUs
#   docker build -t tfx-vision:cuda --build-arg LOCK=requirements-tfx1.21-cuda.lock .   with CUDA, for GPU machines
#   docker build -t tfx-vision:dataflow --target dataflow .                             for Dataflow's workers
#   docker run --rm -v "$PWD:/data" tfx-vision python local_runner.py --data /data/photos --workspace /data/run

# What installs; g++ builds one package (pyfarmhash) and stays behind.
FROM python:3.11-slim-trixie AS build
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
ARG LOCK=requirements-tfx1.21.lock
COPY ${LOCK} /requirements.lock
RUN python -m venv /opt/venv \
    && awk '/^[a-z]/ {is_uv = /^uv==/} is_uv' /requirements.lock > /uv.lock \
    && /opt/venv/bin/python -m pip install --quiet --no-cache-dir --require-hashes --requirement /uv.lock \
    && /opt/venv/bin/uv pip sync --quiet --no-cache --python /opt/venv/bin/python --compile-bytecode --require-hashes /requirements.lock

FROM python:3.11-slim-trixie AS pipeline
COPY --from=build /opt/venv /opt/venv
# oneDNN is off by default on processors without AVX-512, where it makes the network 2.5 times as fast.
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/app TF_ENABLE_ONEDNN_OPTS=1 TF_FORCE_GPU_ALLOW_GROWTH=true PYTHONUNBUFFERED=1
WORKDIR /app
COPY local_runner.py kubeflow_runner.py LICENSE ./
COPY data data
COPY preprocessing preprocessing
COPY models models
COPY pipeline pipeline
RUN python -m compileall -q . && useradd --create-home --uid 1000 tfx && mkdir runs && chown tfx runs
USER tfx
CMD ["python", "local_runner.py", "--help"]

# Dataflow starts a worker by its image's entry point. The version is that of apache-beam in the lock.
FROM apache/beam_python3.11_sdk:2.77.0 AS beam
FROM pipeline AS dataflow
COPY --from=beam /opt/apache/beam /opt/apache/beam
# Beam would else make an environment of its own, which has none of our packages.
ENV RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT=1
ENTRYPOINT ["/opt/apache/beam/boot"]

# The one that a plain `docker build` makes.
FROM pipeline
