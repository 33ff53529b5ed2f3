"""Move decorators from functions to the end of a module, for the mutation tool skips what is decorated."""

from __future__ import annotations

import ast

KEPT = {"staticmethod", "classmethod"}  # which the tool mutates as they stand


def move_decorators(source: str) -> str:
    """The same module, its decorators applied by statements behind it.

    Args:
        source: A module's text. Functions and methods of its top level are changed, nested ones stay.

    Returns:
        The text with ``@torch.no_grad()`` over ``f`` moved to ``f = torch.no_grad()(f)`` at the end.
    """
    lines, applied = source.splitlines(keepends=True), []
    tree = ast.parse(source)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    for owner, body in [(None, tree.body), *((node.name, node.body) for node in classes)]:
        for function in body:
            if not isinstance(function, ast.FunctionDef) or not function.decorator_list:
                continue
            decorators = [ast.unparse(decorator) for decorator in function.decorator_list]
            if len(decorators) == 1 and decorators[0] in KEPT:
                continue
            for decorator in function.decorator_list:
                for number in range(decorator.lineno - 1, decorator.end_lineno or decorator.lineno):
                    lines[number] = ""
            value = f"{owner}.__dict__[{function.name!r}]" if owner else function.name
            for decorator_text in reversed(decorators):
                value = f"{decorator_text}({value})"
            applied.append(f"{owner}.{function.name} = {value}\n" if owner else f"{function.name} = {value}\n")
    return "".join(lines) + "".join(applied)
