# The demo with its weights inside: a container starts without any download and answers on port 7860.
FROM python:3.12-slim

RUN useradd --create-home --uid 1000 demo
WORKDIR /home/demo/app
ENV PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/home/demo/.cache \
    MLLM_DEMO_HOST=0.0.0.0 \
    MLLM_DEMO_PORT=7860

COPY requirements.txt ./
RUN pip install --no-cache-dir -r requirements.txt

COPY --chown=demo:demo app.py LICENSE THIRD_PARTY.md README.md ./
COPY --chown=demo:demo mllm_demo ./mllm_demo
COPY --chown=demo:demo assets ./assets

USER demo
RUN python -m mllm_demo.models.bundled.weights

EXPOSE 7860
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7860/', timeout=4)"]
CMD ["python", "app.py"]
