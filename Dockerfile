# CPU:   docker build -t arp-hub .
# CUDA:  docker build -t arp-hub:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126 .
#
# docker run --rm -v "$PWD/runs:/home/arp/runs" arp-hub accelerate launch recipes/quickstart.py --output runs/digits
# docker run --rm --gpus all arp-hub:cuda arp-hub --help
FROM python:3.12-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1

RUN pip install --index-url "${TORCH_INDEX}" torch torchvision

RUN useradd --create-home arp
WORKDIR /home/arp

# The package and its recipes; everything else is kept out by .dockerignore.
COPY pyproject.toml README.md LICENSE /tmp/arp_hub/
COPY arp_hub /tmp/arp_hub/arp_hub
COPY arp_hub_cli /tmp/arp_hub/arp_hub_cli
RUN pip install "/tmp/arp_hub[plots,tracking]" && rm -r /tmp/arp_hub

COPY --chown=arp:arp recipes recipes
RUN mkdir runs && chown arp:arp runs

USER arp
CMD ["arp-hub", "--help"]
