"""Files of any content, many of them nearly of the kernel's form: a hypothesis strategy."""

from __future__ import annotations

from hypothesis import strategies as st

FIELDS = [
    "",
    "-",
    "30",
    "0:26",
    "/",
    "/..",
    "//",
    "rw",
    "cgroup",
    "cgroup2",
    "memory",
    "rw,memory",
    "max",
    "kB",
    "0",
]
WORDS = st.one_of(
    st.sampled_from([*FIELDS, "\\040", "a\\134b", "\\777", "\0", "²", "٣", "\ud800", "9" * 5000, "MemAvailable:"]),
    st.text(max_size=4),
)
LINES = st.lists(st.lists(WORDS, max_size=12).map(" ".join), max_size=4).map("\n".join)
FILES = st.one_of(st.binary(max_size=80), LINES.map(lambda text: text.encode(errors="surrogatepass")))
