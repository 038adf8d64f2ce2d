"""A diff of two functions has the lines of both, and no others."""

from __future__ import annotations

import inspect

from minirlhf_course.diffs import difference

from minirlhf.control.reinforce import train_reinforce, train_reinforce_with_baseline


def test_a_diff_leads_from_the_first_body_to_the_second():
    fence, *lines, end = difference(train_reinforce, train_reinforce_with_baseline).splitlines()
    assert (fence, end) == ("```diff", "```") and not [line for line in lines if line[:3] in ("---", "+++")]
    bodies = [inspect.getsource(f).split('"""')[2] for f in (train_reinforce, train_reinforce_with_baseline)]
    gone, new = ([line[1:] for line in lines if line[0] == sign] for sign in "-+")
    assert gone and new
    assert all(line in bodies[0] for line in gone) and all(line in bodies[1] for line in new)
