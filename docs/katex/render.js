// Typesets what `pymdownx.arithmatex` marked. KaTeX 0.19.1 lies beside this file (its stylesheet
// reduced to the woff2 fonts), so that formulas appear without a network.
document$.subscribe(() => {
  for (const element of document.querySelectorAll(".arithmatex")) {
    const displayMode = element.tagName === "DIV";
    const formula = element.textContent.trim().slice(2, -2); // between \( \) or \[ \]
    katex.render(formula, element, { displayMode, throwOnError: false });
  }
});
