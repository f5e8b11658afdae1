"""What a forked run finds imported. Nothing here may start a thread.

The names are not used here: importing them once, for all forks, is what this file is for.
"""

import datamodules.text  # noqa: F401
import lightning_modules.cli  # noqa: F401
import lightning_modules.pretrain  # noqa: F401
import tests.faults  # noqa: F401
