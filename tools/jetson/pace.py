# Copyright (c) mmbasis authors. All rights reserved.
"""Whether a shared machine runs at its full speed.

The cores of a virtual machine may be shared with others. They then compute
slower for seconds or minutes, by a quarter where this was seen, while memory
is as fast as ever; so models slow down by different factors, and times of two
such moments do not compare. A matrix product of a few ms shows it.
"""
import time

from .stats import quantile
from .util import now

#: times the best product so far that counts as full speed
TOLERANCE = 1.2
#: seconds before and after a product. Threads of ONNX Runtime spin for a tenth
#: of one after a run, those of the product for some hundredths; what comes
#: next shares the cores with them, and takes twice as long or 4 ms longer
BEFORE, AFTER = .2, .1


class Pace:
    """Times a matrix product.

    Args:
        best_ms (float | None): the shortest time that is known, ms.
    """

    def __init__(self, best_ms=None):
        import numpy as np  # probe and replay do without
        self._matrix = np.random.RandomState(0).rand(600, 600)
        self.best_ms = best_ms

    def probe(self):
        """Returns the median time of five products, with rests around, ms."""
        time.sleep(BEFORE)
        times = []
        for _ in range(5):
            start = now()
            self._matrix.dot(self._matrix)
            times.append((now() - start) * 1e3)
        time.sleep(AFTER)
        found = quantile(sorted(times), .5)
        self.best_ms = min(found, self.best_ms or found)
        return found

    def is_full(self, found_ms):
        """Tells whether a product that took so long is of full speed."""
        return found_ms <= TOLERANCE * self.best_ms

    def at_full_speed(self, run, max_wait):
        """Runs something until the machine was at full speed before and after.

        Args:
            run (callable): what is to be timed; short beside the seconds for
                which a machine keeps its speed.
            max_wait (float): seconds after which what ran at the best speed
                so far will do.

        Returns:
            tuple: what ``run`` returned, and the longer one of the products
            before and after it, ms.
        """
        end, best = now() + max_wait, None
        while best is None or not self.is_full(best[1]) and now() < end:
            before = self.probe()
            while not self.is_full(before) and now() < end:
                before = self.probe()
            found = run()
            product = max(before, self.probe())
            if best is None or product < best[1]:
                best = found, product
        return best
