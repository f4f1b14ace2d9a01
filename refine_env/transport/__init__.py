"""An episode over a TCP connection: a :class:`Sender` plays the server, a :class:`Receiver` the device.

The sender runs an environment with a policy. In every slot it sends the bytes of the message in flight that have flowed
by the end of the slot, so the last of them comes in the slot in which the simulator completes the delivery, and the
device decodes just then. ``docs/bitstream.md`` has the frames as a table.
"""

from refine_env.transport.frames import PROTOCOL_VERSION, Delivery, Reception
from refine_env.transport.receiver import (
    DEFAULT_EPISODE_TIMEOUT,
    DEFAULT_MAX_LATENT_DIM,
    DEFAULT_MAX_NUM_STEPS,
    Receiver,
)
from refine_env.transport.sender import Sender, Transmission

__all__ = [
    "DEFAULT_EPISODE_TIMEOUT",
    "DEFAULT_MAX_LATENT_DIM",
    "DEFAULT_MAX_NUM_STEPS",
    "PROTOCOL_VERSION",
    "Delivery",
    "Receiver",
    "Reception",
    "Sender",
    "Transmission",
]
