# The server on a CPU: docker build --build-arg TORCH_INDEX=... -t dspark .
FROM python:3.12-slim

WORKDIR /opt/dspark
# torch first: a layer that seldom changes. Without TORCH_INDEX, the address that pytorch.org gives
# for "Pip, CPU", it brings gigabytes of CUDA along.
ARG TORCH_INDEX
COPY constraints.txt ./
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} -c constraints.txt torch

COPY pyproject.toml README.md LICENSE ./
COPY dspark ./dspark
RUN pip install --no-cache-dir -c constraints.txt ".[serve,json]" \
    && useradd --system --create-home dspark

USER dspark
EXPOSE 8000
HEALTHCHECK --interval=30s --start-period=60s CMD \
    python -c "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=5)"
ENTRYPOINT ["dspark"]
CMD ["serve", "bundled", "--host", "0.0.0.0"]
