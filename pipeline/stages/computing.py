"""A job as the processes that compute see it: with the proxy and the decoder of its input. Loads torch and open_clip.

The driver never imports this module: it hands work to tasks that do.
"""

from __future__ import annotations

from functools import cached_property

from pipeline.config import Config, ProxyConfig
from pipeline.data.decode import Decoder
from pipeline.errors import ConfigError, InputError
from pipeline.models.clip import PairModel, build_model, other_preprocessing
from pipeline.models.takeover import import_checkpoints
from pipeline.stages.job import Job


class ComputingJob(Job):
    """A job with its model."""

    def model(self, run: int = 0) -> PairModel:
        """The proxy at its initial weights; each proxy run has a seed of its own."""
        proxy = self.config.proxy
        return build_model(proxy.model, pretrained=proxy.pretrained, loss=proxy.loss, seed=self.config.seed + run)

    @cached_property
    def decoder(self) -> Decoder:
        """Decoder of pairs into the proxy's input; building the proxy for it is the dear part, so it is made once."""
        model = self.model()
        return Decoder.configured(model.image_spec, model.tokenize, self.config.data)


def check_proxy(config: Config) -> str:
    """What to know of the proxy before it is used, "" for nothing.

    Raises `ConfigError` when it cannot be built, or does not take the weights given.
    """
    proxy = config.proxy
    try:
        ComputingJob(config).model()
    except InputError as error:
        weights = proxy.pretrained is not None and _can_be_built(proxy)
        raise ConfigError(str(error), key="proxy.pretrained" if weights else "proxy.model") from None
    if proxy.pretrained is None and proxy.checkpoints is None:
        return ""
    other = other_preprocessing(proxy.model)
    if not other:
        return ""
    listed = ", ".join(f"{key} {value}" for key, value in other.items())
    return (
        f"warning: published weights of {proxy.model} expect images with {listed}, which is not what they get here "
        "(open_clip's own, as its trainer takes for a new model): if yours come from them, give proxy.model as a JSON "
        'file {"model_cfg": ..., "preprocess_cfg": ...}'
    )


def _can_be_built(proxy: ProxyConfig) -> bool:
    """Whether there is such a model, apart from its weights."""
    try:
        build_model(proxy.model, loss=proxy.loss)
    except InputError:
        return False
    return True


def take_over_checkpoints(config: Config) -> None:
    """Check the checkpoints that the config names and write them to the run's folder in our form."""
    job = ComputingJob(config)
    proxy = config.proxy
    import_checkpoints(
        proxy.checkpoints or [],
        job.model(),
        job.folder.checkpoints,
        dataset_size=job.samples,
        steps=proxy.checkpoint_steps,
        rates=proxy.checkpoint_rates,
    )
