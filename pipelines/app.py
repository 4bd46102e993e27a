"""Ask a registered model in the browser: ``python -m pipelines.app models:/NAME@ALIAS``."""

import socket
import webbrowser

from pipelines.engine.command import command
from pipelines.engine.terminal import say


def app(
    model: str,
    against: str | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    device: str = "auto",
    browser: bool = True,
) -> None:
    """Opens a local web page for a registered model, which runs until Ctrl-C. Drop pictures or a video on it to see the
    predictions.

    Below it are the pictures that the model's run logged, by step.

    Args:
        model: ``models:/name@alias`` or ``models:/name/version``.
        against: another model or version, whose predictions are shown beside the first one's.
        host: address to listen on; by default only this machine can open the page. There is no password.
        port: port to listen on; 0 chooses a free one.
        device: where the models run, such as ``cuda``; ``auto`` is the GPU if there is one.
        browser: open the page in a browser.

    Raises:
        ValueError: there is no such model or device, it does not take pictures, or the port is not available.
    """
    import uvicorn

    from pipelines.serving.model import VisionModel
    from pipelines.serving.page import Asked, page
    from pipelines.serving.subject import Subject

    subjects = [Subject.find(address) for address in (model, against) if address]
    asked = [Asked(subject, VisionModel().load(subject.folder, device)) for subject in subjects]
    for subject, one in zip(subjects, asked, strict=True):
        one.model.check_pictures(subject.address)
    try:
        family = socket.getaddrinfo(host, port)[0][0]
        listening = socket.create_server((host, port), family=family)
    except socket.gaierror as error:
        raise ValueError(
            f"--host {host} is no address of this machine ({error.strerror}): leave it out, or give one, such as 0.0.0.0."
        ) from None
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"The page cannot listen on {host}, port {port} ({error}): --port 0 takes a free port."
        ) from None
    place = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
    say(f"{place} shows {' and '.join(subject.address for subject in subjects)}; Ctrl-C ends it.")
    if browser:
        webbrowser.open(place)
    with page(asked, host) as served:
        uvicorn.Server(uvicorn.Config(served, log_level="warning")).run(sockets=[listening])


if __name__ == "__main__":
    command(app)
