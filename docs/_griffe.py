"""Shows the constructors of Equinox modules in the documentation.

A module whose constructor is made from its fields is documented by `Foo.__init__.__doc__ = ...`
below the class. The documentation is built from source, without running it, so that constructor is
written out here for Griffe to find.
"""

import ast

import griffe


class FieldConstructors(griffe.Extension):
    def on_module_node(self, *, node: ast.AST | griffe.ObjectNode, **kwargs) -> None:
        assert isinstance(node, ast.Module)
        classes = {x.name: x for x in node.body if isinstance(x, ast.ClassDef)}
        for statement in node.body:
            match statement:
                case ast.Assign(
                    targets=[
                        ast.Attribute(
                            value=ast.Attribute(value=ast.Name(id=name), attr="__init__"),
                            attr="__doc__",
                        )
                    ],
                    value=ast.Constant(value=str(docstring)),
                ):
                    classes[name].body.append(_constructor(classes[name], docstring))


def _constructor(cls: ast.ClassDef, docstring: str) -> ast.stmt:
    positional, keyword_only = ["self"], []
    after_marker = False
    for field in cls.body:
        if isinstance(field, ast.AnnAssign):
            if ast.unparse(field.annotation).endswith("KW_ONLY"):
                after_marker = True
                continue
            options, default = {}, field.value  # or those of `eqx.field(...)`
            match field.value:
                case ast.Call(func=ast.Attribute(attr="field"), keywords=keywords):
                    options = {x.arg: ast.unparse(x.value) for x in keywords}
                    default = next((x.value for x in keywords if x.arg == "default"), None)
            parameter = f"{ast.unparse(field.target)}: {ast.unparse(field.annotation)}"
            if default is not None:
                parameter += f" = {ast.unparse(default)}"
            is_keyword = after_marker or options.get("kw_only") == "True"
            if options.get("init") != "False":
                (keyword_only if is_keyword else positional).append(parameter)
    parameters = ", ".join([*positional, *(["*"] if keyword_only else []), *keyword_only])
    (function,) = ast.parse(f"def __init__({parameters}): {docstring!r}").body
    return function
