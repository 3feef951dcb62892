"""Drawn graphs, read back: every node and edge is drawn, edges lead down, no box covers another, names stay text."""

import re
import xml.etree.ElementTree as ET
from itertools import combinations, pairwise
from random import Random

import pytest

from gemma2.posttrain.reports.graph.graph import graph_of
from gemma2.posttrain.reports.graph.lanes import graph_rows, lanes_of
from gemma2.posttrain.reports.graph.layers import apart, broken, ranks
from gemma2.posttrain.reports.graph.render import Edge, Node, dag_mermaid, dag_svg, dag_text
from gemma2.posttrain.reports.plots.values import clipped, columns_of

SVG = "{http://www.w3.org/2000/svg}"
EVIL = '</text><script>alert("1")</script>&amp;`\' #quot; ]} |x|'


def warp(policies=2):
    """Nodes and edges of two WARP iterations."""
    names = {"sft": [], "reward": ["sft"]}
    start = "sft"
    for i in (1, 2):
        runs = [f"{i}/policy-{m}" for m in range(1, policies + 1)]
        names |= {run: [start, "reward"] for run in runs}
        names |= {f"{i}/slerp": [start, *runs], f"{i}/init": [start, f"{i}/slerp"]}
        start = f"{i}/init"
    names["front"] = ["sft", "reward", *(name for name in names if "policy" in name)]
    nodes = [Node(name, name, "command", "complete") for name in names]
    return nodes, [Edge(parent, name, "role") for name, parents in names.items() for parent in parents]


def scattered(count, seed=0):
    """A random graph: every node uses up to three earlier ones."""
    random = Random(seed)
    nodes = [Node(f"n{i}", f"stage {i}", "sft", random.choice(["complete", "failed", ""])) for i in range(count)]
    edges = [
        Edge(f"n{i}", f"n{j}")
        for j in range(1, count)
        for i in random.sample(range(j), min(j, random.choice([0, 1, 3])))
    ]
    return nodes, edges


def long_names():
    nodes = [Node("a", EVIL, EVIL, EVIL, EVIL), Node("b", "模型" * 40, "x" * 300), Node("c", "new\nline\x00\ud800")]
    return nodes, [Edge("a", "b", EVIL), Edge("b", "c")]


CASES = {
    "warp": warp(),
    "sixteen": warp(16),
    "one": ([Node("only", "only")], []),
    "none": ([], []),
    "sixty": scattered(60),
    "apart": ([Node(f"n{i}", f"alone {i}") for i in range(9)], []),
    "names": long_names(),
}


def boxes(svg):
    """(left, top, right, bottom) of every node by its title's first line."""
    found = {}
    for group in ET.fromstring(svg).iter(f"{SVG}g"):
        title = group.find(f"{SVG}title")
        for rectangle in group.findall(f"{SVG}rect") if title is not None else []:
            x, y, width, height = (float(rectangle.get(key)) for key in ("x", "y", "width", "height"))
            found[title.text.splitlines()[0].rpartition(": ")[0] or title.text.splitlines()[0]] = (
                x, y, x + width, y + height,
            )  # fmt: skip
    return found


def edge_titles(svg):
    paths = [path for path in ET.fromstring(svg).iter(f"{SVG}path") if path.get("class") == "edge"]
    return [line for path in paths for line in path.find(f"{SVG}title").text.splitlines()]


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_no_box_covers_another_and_all_are_inside_the_picture(case, narrow):
    svg = dag_svg(*CASES[case], narrow=narrow)
    found = list(boxes(svg).values())
    assert len(found) == len(CASES[case][0])
    for a, b in combinations(found, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    left, top, width, height = map(float, ET.fromstring(svg).get("viewBox").split())
    assert all(left <= a and top <= b and c <= left + width and d <= top + height for a, b, c, d in found)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("case", ["warp", "sixteen", "sixty"])
def test_every_edge_is_drawn_and_leads_downwards(case, narrow):
    nodes, edges = CASES[case]
    svg, label = dag_svg(nodes, edges, narrow=narrow), {node.id: node.label for node in nodes}
    titles, place = edge_titles(svg), boxes(svg)
    assert len(titles) == len(edges)
    for edge in edges:
        role = f" ({edge.role})" if edge.role else ""
        assert f"{label[edge.source]} → {label[edge.target]}{role}" in titles
        assert place[label[edge.source]][3] < place[label[edge.target]][1]


def test_edges_end_at_their_box():
    nodes, edges = scattered(40)
    svg, label = dag_svg(nodes, edges), {node.label: node.id for node in nodes}
    place = boxes(svg)
    frames = [r for r in ET.fromstring(svg).iter(f"{SVG}rect") if r.get("class") == "frame"]
    for path in ET.fromstring(svg).iter(f"{SVG}path"):
        if path.get("class") == "edge" and not frames:
            source, _, target = path.find(f"{SVG}title").text.partition(" → ")
            assert {source, target} <= label.keys()
            (x0, y0), *_, (x1, y1) = [tuple(map(float, p)) for p in re.findall(r"(-?[\d.]+) (-?[\d.]+)", path.get("d"))]
            assert place[source][0] <= x0 <= place[source][2] and y0 == pytest.approx(place[source][3], abs=0.11)
            assert place[target][0] <= x1 <= place[target][2] and y1 == pytest.approx(place[target][1], abs=0.11)


def test_the_narrow_form_is_360_wide_and_has_one_box_per_row():
    svg = dag_svg(*warp(), narrow=True)
    assert ET.fromstring(svg).get("viewBox").split()[2] == "366"
    assert all(a[3] <= b[1] for a, b in pairwise(boxes(svg).values()))


def test_parallel_copies_share_a_frame_and_their_edges():
    svg = dag_svg(*warp(16))
    root = ET.fromstring(svg)
    assert len([r for r in root.iter(f"{SVG}rect") if r.get("class") == "frame"]) == 2
    assert len([p for p in root.iter(f"{SVG}path") if p.get("class") == "edge"]) < 20
    assert "1/policy-16 → 1/slerp (role)" in edge_titles(svg)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("make", [dag_svg, dag_text, dag_mermaid])
def test_the_same_graph_gives_the_same_bytes(case, make):
    assert make(*CASES[case]) == make(*CASES[case])


@pytest.mark.parametrize("narrow", [False, True])
def test_hostile_names_stay_text(narrow):
    svg = dag_svg(*long_names(), narrow=narrow, page="family")
    root = ET.fromstring(svg)
    assert not [node for node in root.iter() if "script" in node.tag]
    assert EVIL in "\n".join(title.text for title in root.iter(f"{SVG}title"))
    assert "\x00" not in svg


def test_a_status_is_readable_without_its_colour():
    nodes = [Node("a", "a", "rlhf", "complete"), Node("b", "b", "rlhf", "failed"), Node("c", "c", "", "not needed")]
    words = ["".join(text.itertext()) for text in ET.fromstring(dag_svg(nodes, [])).iter(f"{SVG}text")]
    assert words == ["a", "rlhf", "b", "rlhf · failed", "c", "not needed"]
    marks = re.findall(r'<g class="mark [^>]*>(.*?)</g>', dag_svg(nodes, []))
    assert len(set(marks)) == 3


def test_an_element_of_a_page_has_prefixed_ids_and_the_variables_of_the_page():
    svg = dag_svg(*warp(), page="family")
    root = ET.fromstring(svg)
    ids = [node.get("id") for node in root.iter() if node.get("id")]
    assert ids == ["family-graph", "family-graph-arrow"]
    assert set(re.findall(r"url\((.*?)\)", svg)) == {"#family-graph-arrow"}
    css = root.find(f"{SVG}style").text
    assert "var(--ink,#1d232e)" in css and all(
        rule.startswith("#family-graph ") for rule in re.findall(r"[^{}]+(?={)", css)
    )
    assert root.get("width") is None and "prefers-color-scheme" not in svg


def test_a_file_has_its_size_and_both_colour_schemes():
    svg = dag_svg(*warp())
    assert ET.fromstring(svg).get("width") and "prefers-color-scheme:dark" in svg and "var(" not in svg


def test_boxes_of_nodes_with_links_are_links():
    svg = dag_svg([Node("a", "a", href='#of"1'), Node("b", "b")], [Edge("a", "b")])
    assert [link.get("href") for link in ET.fromstring(svg).iter(f"{SVG}a")] == ['#of"1']
    assert ET.fromstring(svg).get("role") == "group"


def test_nodes_come_in_topological_order_however_they_are_given():
    nodes, edges = scattered(30)
    order = list(graph_of(nodes[::-1], edges).nodes)
    assert all(order.index(edge.source) < order.index(edge.target) for edge in edges)


# --- cycles and mistakes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [dag_svg, dag_text, dag_mermaid])
def test_a_cycle_is_drawn(make):
    nodes = [Node(name, f"node {name}") for name in "abcd"]
    text = make(nodes, [Edge("a", "b"), Edge("b", "c"), Edge("c", "a"), Edge("c", "d"), Edge("d", "d")])
    assert all(f"node {name}" in text for name in "abcd")


def test_the_edge_that_closes_a_cycle_points_upwards():
    svg = dag_svg([Node(n, n) for n in "ab"], [Edge("a", "b"), Edge("b", "a")])
    (path,) = (p for p in ET.fromstring(svg).iter(f"{SVG}path") if p.get("class") == "edge")
    assert path.get("marker-start") and path.get("marker-end")
    assert path.find(f"{SVG}title").text.splitlines() == ["a → b", "b → a"]


def test_an_edge_to_an_unknown_node_and_two_nodes_with_one_id_are_errors():
    with pytest.raises(ValueError, match="a -> x leads to no node"):
        dag_text([Node("a", "a")], [Edge("a", "x")])
    with pytest.raises(ValueError, match="same id"):
        dag_text([Node("a", "a"), Node("a", "b")], [])


# --- text -----------------------------------------------------------------------------------------------------------


def followed(lines):
    """The nodes that each node uses, read from the lanes: lines that reach a mark from above or from its side."""
    carried, used = {}, []
    for row, line in enumerate(lines):
        own = next(i for i, char in enumerate(line) if char in "●✗○◐◑")
        parents = [carried.pop(own)] if own in carried else []
        for step in (-1, 1):
            at = own + step
            while 0 <= at < len(line) and line[at] in "─│├┼┴┤╰╯":
                if line[at] in "├┼┤":
                    parents.append(carried[at])
                elif line[at] in "┴╰╯":
                    parents.append(carried.pop(at))
                if line[at] in "├╰┤╯":
                    break
                if line[at] == "│" and line[at + (step if step < 0 else 0)] == " ":
                    break
                at += step
        carried[own] = row
        below = lines[row + 1] if row + 1 < len(lines) else ""
        carried = {at: source for at, source in carried.items() if at < len(below) and below[at] not in " ─"}
        used.append(sorted(parents))
    return used


@pytest.mark.parametrize("seed", range(8))
def test_the_lanes_show_exactly_which_nodes_every_node_uses(seed):
    nodes, edges = scattered(25, seed)
    graph = graph_of(nodes, edges)
    names = list(graph.nodes)
    expected = [sorted(names.index(e.source) for e in set(edges) if e.target == name) for name in names]
    assert followed(graph_rows(graph)) == expected


def test_a_fork_and_a_join_in_lanes():
    edges = [Edge("a", "b"), Edge("a", "c"), Edge("b", "d"), Edge("c", "d")]
    assert dag_text([Node(n, n, "sft", "complete") for n in "abcd"], edges).splitlines() == [
        "●    a  sft  complete",
        "├─●  b  sft  complete",
        "● │  c  sft  complete",
        "●─╯  d  sft  complete",
    ]


@pytest.mark.parametrize("width", [50, 80, 120])
@pytest.mark.parametrize("case", CASES)
def test_text_keeps_to_its_width_and_names_every_node(case, width):
    text = dag_text(*CASES[case], width)
    assert all(columns_of(line) <= width for line in text.splitlines())
    assert len(text.splitlines()) >= len(CASES[case][0])
    if case in ("warp", "sixteen"):
        assert all(node.label in text for node in CASES[case][0])


def test_names_replace_too_many_lanes():
    text = dag_text(*warp(16))
    assert "●" not in text
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("1/slerp"))
    assert lines[at + 1].split()[:4] == ["←", "sft", "1/policy-1", "1/policy-2"]


def test_spans_that_do_not_overlap_share_lanes():
    # 0 -> 1 -> 2 -> 3 in one lane, 0's trunk to 3 outside it
    assert lanes_of([3, 2, 3, 3]) == [1, 0, 0, None]


# --- mermaid --------------------------------------------------------------------------------------------------------


def test_mermaid_holds_every_node_edge_and_status():
    nodes = [Node("a", "sft", "sft", "complete"), Node("b", "rl", "rlhf", "failed")]
    assert dag_mermaid(nodes, [Edge("a", "b", "policy")]).splitlines() == [
        "flowchart TD",
        '    n0["sft<br/>sft"]',
        '    n1["rl<br/>rlhf · failed"]',
        '    n0 -->|"policy"| n1',
        "    classDef failed stroke:#d55e00,stroke-width:3px",
        "    class n1 failed",
    ]


def test_mermaid_source_is_not_broken_by_names():
    lines = dag_mermaid(*long_names()).splitlines()
    assert len(lines) == 6
    for line in lines[1:4]:
        inner = re.fullmatch(r'    n\d\["(.*)"\]', line)[1]
        assert not set(re.sub(r"#\d+;|<br/>", "", inner)) & set('"<>&#;|[]{}`')


# --- layout ---------------------------------------------------------------------------------------------------------


def test_layers_are_longest_paths_and_sources_are_just_above_their_users():
    # 0 -> 1 -> 2 -> 3 and a source 4 that only 3 uses
    assert ranks(5, [(0, 1), (1, 2), (0, 2), (2, 3), (4, 3)]) == [0, 1, 2, 3, 2]


def test_a_layer_too_wide_for_a_page_is_split():
    # 1150 px hold five boxes of 200 with their gaps of 22
    assert broken([0] * 7 + [1], [(200.0, 30.0)] * 8) == [0, 0, 0, 0, 0, 1, 1, 2]
    assert broken([0, 0], [(2000.0, 30.0), (10.0, 30.0)]) == [0, 1]


def test_apart_is_the_least_squares_solution():
    # Two at the same place go to either side of it; a third far away stays.
    assert apart([5.0, 5.0, 40.0], [10.0, 10.0], [1.0, 1.0, 1.0]) == pytest.approx([0.0, 10.0, 40.0])
    assert apart([5.0, 5.0], [10.0], [3.0, 1.0]) == pytest.approx([2.5, 12.5])


def test_clipping_keeps_both_ends():
    assert clipped("iteration-1/policy-1", 11) == "itera…icy-1"
    assert clipped("short", 5) == "short"
    assert columns_of(clipped("模型模型模型", 5)) <= 5
