from tests.test_deploy.test_wrong_graphs import *
from tests.test_deploy.conftest import *
def test_show(right_classifier, right_detector):
    for r in (right_classifier, right_detector):
        for e in [lambda g,w: None]+EDITS:
            try:
                res, = compare(r.deployment, [r.edited(e)], r.images)
                print(getattr(e,'__name__',''), {k: ({a: (f'{b:.1e}' if isinstance(b,float) else b) for a,b in v.items()} if isinstance(v,dict) else v) for k,v in res.items()})
            except Exception as x:
                print(e.__name__, 'ERROR', repr(x)[:200])
