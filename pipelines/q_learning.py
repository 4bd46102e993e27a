"""Train agents by deep Q-learning: ``python -m pipelines.q_learning fit|validate|test|predict|preview``; ``play`` episodes with one."""

from dataclasses import replace

from modules.ranges import PositiveInt
from pipelines.engine.task import Task


def play(
    model: str,
    environment: str | None = None,
    episodes: PositiveInt = 10,
    film: str | None = None,
    seed: int = 0,
    device: str = "auto",
) -> str:
    """Plays episodes with a registered model, always choosing the action of highest value.

    Args:
        model: ``models:/name@alias`` or ``models:/name/version``.
        environment: another environment with the same observations and actions; by default that of the training.
        episodes: number of episodes.
        film: path of a video of the first episode, ``.mp4``.
        seed: random seed of the episodes.
        device: where the model runs, such as ``cuda``; ``auto`` is the GPU if there is one.

    Returns:
        The return of each episode, their mean and their standard deviation.

    Raises:
        ValueError: there is no such model or environment, or the two do not fit.
    """
    import numpy as np

    from datamodules import Gymnasium
    from modules import QLearningModule
    from modules.q_learning import framed
    from pipelines.serving import registry, store
    from pipelines.serving.video import Drawing

    if film and not film.endswith(".mp4"):
        raise ValueError(f"--film {film} must end in .mp4.")
    answering, module = registry.load_as(QLearningModule, model, ": this is a command for agents.", device)
    learned = store.learned_from(registry.model_folder(model))
    assert isinstance(learned, Gymnasium)
    data = replace(learned, environment=environment or learned.environment)
    if data.preprocessing != answering.preprocessing or data.num_classes != module.num_classes:
        raise ValueError(
            f"{data.title} shows {'×'.join(map(str, data.space[:3]))} and takes {data.num_classes} actions, and {model} has learned "
            f"from other observations or actions: leave the environment out for that of its training."
        )
    seeds = [int(np.random.SeedSequence((seed, number)).generate_state(1)[0]) for number in range(episodes)]
    played = data.play(seeds, module.values)
    if film:
        drawing = Drawing(film, 20)
        for number, frame in enumerate(data.film(played[0].seed, played[0].actions, len(played[0].actions) + 1)):
            drawing.write(framed(frame), number / 20)
        drawing.close()
    returns = [sum(episode.rewards) for episode in played]
    lines = [f"episode {number}: return {value:g}" for number, value in enumerate(returns)]
    filmed = f" The first one is in {film}." if film else ""
    return "\n".join([*lines, f"{data.title}: {np.mean(returns):.2f} ± {np.std(returns):.2f}.{filmed}"])


q_learning = Task("q_learning", "modules.QLearningModule", "datamodules.Gymnasium", ("pipelines.q_learning.play",))

if __name__ == "__main__":
    q_learning.main()
