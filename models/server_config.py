"""The settings of the HTTP server; each is a flag of `python -m models.server`.

Light to import, so that the command can answer `--help` without TensorFlow. Called by `models.server` and what it runs.
"""

import pydantic

DEFAULT_NAME = "model"


class ServerConfig(pydantic.BaseModel):
    """What the server serves, and how much of anything it takes. The descriptions are the flags' help."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)

    model: str = pydantic.Field(
        min_length=1, description="folder of numbered versions, or one SavedModel; local or gs:// (AIP_STORAGE_URI)"
    )
    name: str = pydantic.Field(DEFAULT_NAME, pattern=r"^[\w.-]{1,128}$", description="of the model, in the URLs")
    host: str = pydantic.Field("127.0.0.1", description="address to listen on; 0.0.0.0 where AIP_HTTP_PORT is set")
    port: int = pydantic.Field(8501, ge=0, le=65535, description="0 takes a free one (AIP_HTTP_PORT)")
    health_route: str = pydantic.Field(
        "/healthz", pattern=r"^/[^{}?#\s]+$", description="answers 200 when a model is ready (AIP_HEALTH_ROUTE)"
    )
    predict_route: str = pydantic.Field(
        "/predict", pattern=r"^/[^{}?#\s]+$", description="Vertex AI's route of predictions (AIP_PREDICT_ROUTE)"
    )

    max_batch_size: int = pydantic.Field(32, ge=1, le=1024, description="images that the network computes together")
    max_latency_ms: float = pydantic.Field(
        8.0, ge=0, le=1000, description="that an image waits, at most, for others to fill its batch"
    )
    max_queue: int = pydantic.Field(256, ge=1, description="images that wait for the network; beyond it 429")
    max_explanations: int = pydantic.Field(8, ge=1, description="images of one :explain, and of all that wait")
    max_gradients: int = pydantic.Field(
        256, ge=2, description="of an explanation: its steps, times its noisy copies where it has any"
    )

    max_body_mib: float = pydantic.Field(10.0, gt=0, le=1024, description="of a request; beyond it 413")
    max_buffered_mib: float = pydantic.Field(256.0, gt=0, description="of all request bodies in memory; beyond it 429")
    max_instances: int = pydantic.Field(64, ge=1, description="images of a request")
    max_pixels: int = pydantic.Field(50_000_000, ge=1, description="of an image, and of a batch together")
    max_connections: int = pydantic.Field(1000, ge=1, description="open at a time; beyond it 429")

    head_seconds: float = pydantic.Field(10.0, gt=0, description="that a client may take to send a request's head")
    body_seconds: float = pydantic.Field(20.0, gt=0, description="that it may take to send the body; beyond it 408")
    request_seconds: float = pydantic.Field(30.0, gt=0, description="that an answer may take; beyond it 504")
    keep_alive_seconds: int = pydantic.Field(60, ge=1, description="that an idle connection stays open")
    drain_seconds: int = pydantic.Field(25, ge=1, description="that requests may take to end after SIGTERM")
    poll_seconds: float = pydantic.Field(5.0, gt=0, description="between two looks for a new version")

    facts: str = pydantic.Field(
        "",
        description="file to append a line to for each answered image: its predicted label, height, width, aspect, brightness "
        "and channels, for pipeline.predict drift; left out, none is written",
    )
    facts_share: float = pydantic.Field(1.0, gt=0, le=1, description="of the answered images that get a line, at random")
    facts_max_mb: float = pydantic.Field(
        100.0, gt=0, description="of the file, in megabytes; a full one becomes FILE.1, in the place of an earlier one"
    )

    @pydantic.model_validator(mode="after")
    def _check_together(self) -> "ServerConfig":
        if self.health_route == self.predict_route:
            raise ValueError(
                f"Expected two routes. Received: {self.health_route} for health and for predictions. Give two different ones."
            )
        if self.max_queue < self.max_instances:
            raise ValueError(
                f"Expected `max_queue` of `max_instances` ({self.max_instances}) or more, so that every allowed request fits. "
                f"Received: max_queue={self.max_queue}. Raise it, or lower `max_instances`."
            )
        return self

    @property
    def max_body_bytes(self) -> int:
        """Bytes that a request's body may have."""
        return int(self.max_body_mib * 2**20)

    @property
    def max_buffered_bytes(self) -> int:
        """Bytes that all bodies in memory may have together."""
        return int(self.max_buffered_mib * 2**20)

    @property
    def facts_max_bytes(self) -> int:
        """Bytes that the file of facts may have."""
        return int(self.facts_max_mb * 1e6)

    @property
    def exchange_seconds(self) -> float:
        """Seconds from the end of a request's head to the end of its answer, after which the connection is cut."""
        return self.body_seconds + self.request_seconds + self.head_seconds
