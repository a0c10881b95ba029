"""Settings of the streaming endpoint."""

from dataclasses import dataclass, field
from typing import Literal

from infra.settings import at_least, positive, set_places


@dataclass(frozen=True)
class AccessConfig:
    """Who may connect, and how much each may ask for."""

    tokens: str | None = None
    """File with one bearer token a line; SELF_FORCING_TOKENS, separated by commas, where unset. Without any,
    only this machine is answered."""
    origins: tuple[str, ...] = ()
    """Origins of other pages that may connect, such as https://example.com."""
    streams: int = 64
    """Streams that one token may have open on a replica."""
    requests_per_minute: int = 600
    """Requests that one token may make of a replica, on average; a tenth of them may come at once."""

    def __post_init__(self) -> None:
        set_places(self, "tokens")
        for name in ("streams", "requests_per_minute"):
            if getattr(self, name) < 1:
                raise ValueError(f"access.{name} is {getattr(self, name)}; it must be at least 1.")


@dataclass(frozen=True)
class VideosConfig:
    """Videos that are made whole and kept for download."""

    storage: str = "outputs/videos"
    """Directory or s3:// prefix that every replica reaches, and no other server uses."""
    expire_s: float = 86400.0
    """Seconds after which a finished video is deleted."""
    longest_frames: int = 4096
    """Most latent frames of one video."""
    unfinished: int = 64
    """Videos of one token that may wait or be made at once."""

    def __post_init__(self) -> None:
        set_places(self, "storage", stored=("storage",))
        for name in ("expire_s", "longest_frames", "unfinished"):
            if not getattr(self, name) > 0:
                raise ValueError(f"videos.{name} is {getattr(self, name)}; it must be positive.")


@dataclass(frozen=True)
class EncoderConfig:
    """The processes that hold UMT5, for all replicas; none is started for a model with an encoder of its
    own."""

    replicas: int = 1
    """Processes up to which Ray Serve goes under load."""
    cpus: float = 1.0
    """CPUs that Ray reserves for each."""
    gpus: float = 0.0
    """GPUs that Ray reserves for each: with one UMT5-XXL takes 11 GB of it, without 22 GB of host memory."""

    def __post_init__(self) -> None:
        at_least(self, 1, "replicas")
        at_least(self, 0, "cpus", "gpus")


@dataclass(frozen=True)
class ServeConfig:
    """The streaming endpoint."""

    model: str = "outputs/distilled/model"
    """Model directory of a student with a rolling window, or models:/NAME@ALIAS, which is then followed."""
    light_decoder: str | None = None
    """Weights of a TAEHV, which decodes in place of the VAE, and faster."""
    registry: str | None = None
    """Tracking URI of the model registry; MLFLOW_TRACKING_URI where unset."""
    slots: int = 8
    """Streams that run at once on a replica."""
    queue: int = 32
    """WebSocket viewers who may wait for a slot of a replica."""
    compile: bool = False
    """Compile the model's calls with TorchInductor before a replica takes viewers; on a CPU that needs a C++
    compiler, and is seldom faster."""
    replicas: int = 1
    """Replicas to begin with, and the fewest."""
    most_replicas: int | None = None
    """Replicas up to which Ray Serve goes under load; as many as `replicas` where unset."""
    cpus: float = 1.0
    """CPUs that Ray reserves for a replica."""
    gpus: float = 0.0
    """GPUs that Ray reserves for a replica."""
    drain_s: float = 600.0
    """Seconds that running streams may go on when a replica is asked to stop."""
    start_s: float = 10.0
    """Seconds that a WebSocket connection may take to say what it wants."""
    reconnect_s: float = 30.0
    """Seconds that the session of a viewer whose connection broke is kept."""
    pause_s: float = 600.0
    """Seconds that a viewer may pause; then the session ends."""
    refresh_s: float = 5.0
    """Seconds between two looks at the alias."""
    on_promotion: Literal["finish", "move"] = "finish"
    """What a running stream does when the alias moves: it finishes with its model, or goes on with the new
    one from its next chunk on."""
    encoder: EncoderConfig = EncoderConfig()
    access: AccessConfig = field(default_factory=AccessConfig)
    videos: VideosConfig = field(default_factory=VideosConfig)

    def __post_init__(self) -> None:
        set_places(self, "light_decoder")
        if not self.registered:
            set_places(self, "model", stored=("model",))
        at_least(self, 1, "slots", "replicas")
        at_least(self, 0, "queue")
        positive(self, "start_s", "reconnect_s", "pause_s", "refresh_s", "drain_s")
        if self.most_replicas is not None and self.most_replicas < self.replicas:
            raise ValueError(
                f"most_replicas is {self.most_replicas}; it must be at least replicas, {self.replicas}."
            )

    @property
    def registered(self) -> bool:
        """Whether the model comes from the registry."""
        return self.model.startswith("models:/")

    @property
    def name(self) -> str:
        """The model's name in requests: that of the registry, or self-forcing."""
        if not self.registered:
            return "self-forcing"
        return self.model.removeprefix("models:/").split("@")[0].split("/")[0]
