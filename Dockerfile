# The server on a CPU: docker build -t dspark . && docker run -p 8000:8000 dspark
FROM python:3.12-slim

WORKDIR /opt/dspark
# The CPU build of torch first: it is all that a CPU needs, and a layer that seldom changes.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY constraints.txt ./
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" -c constraints.txt torch

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
