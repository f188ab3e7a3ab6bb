// Shows below a Cascade node what it used in its last run, and tells the stages apart by colour.

import { app } from "../../../scripts/app.js";

// Title and body of a node, of the editor's own palette, by the model that it loads or runs; as in workflows/layout.py.
const COLOURS = {
  CASCADE_TEXT_ENCODER: ["#232", "#353"],
  CASCADE_STAGE_C: ["#323", "#535"],
  CASCADE_STAGE_B: ["#223", "#335"],
  CASCADE_STAGE_A: ["#233", "#355"],
  CASCADE_PREVIEWER: ["#432", "#653"],
  CASCADE_LATENT_ENCODER: ["#2a363b", "#3f5159"],
  CASCADE_IMAGE_ENCODER: ["#332922", "#593930"],
  CASCADE_IP_ADAPTER: ["#332922", "#593930"],
  CASCADE_CONTROLNET: ["#322", "#533"],
  CASCADE_CONTROL: ["#322", "#533"],
  CASCADE_FACES: ["#322", "#533"],
};

const USED = "cascade_used";
const LINE = 16;
const LETTER = 5.5;
const MARGIN = 10;
const MOST_LINES = 6;

function isCascade(nodeData) {
  return nodeData.name.startsWith("Cascade");
}

/** The colours of the first model among a node's outputs, else among its inputs. */
function coloursOf(nodeData) {
  const inputs = Object.values(nodeData.input?.required ?? {}).map(([type]) => type);
  return COLOURS[[...(nodeData.output ?? []), ...inputs].find((type) => type in COLOURS)];
}

/** A text below the node's widgets, which is part neither of saved workflows nor of prompts. */
function showUsed(node, text) {
  let widget = node.widgets?.find(({ name }) => name === USED);
  if (!widget) {
    const element = document.createElement("div");
    Object.assign(element.style, {
      boxSizing: "border-box",
      color: "#ddd",
      fontSize: "11px",
      lineHeight: `${LINE}px`,
      overflow: "auto",
      overflowWrap: "anywhere",
      whiteSpace: "pre-line",
    });
    const height = () => widget.lines * LINE + 2 * MARGIN;
    const options = { serialize: false, margin: MARGIN, getMinHeight: height, getMaxHeight: height };
    options.getValue = () => element.textContent;
    options.setValue = (value) => (element.textContent = value);
    widget = node.addDOMWidget(USED, USED, element, options);
    widget.serialize = false;
  }
  const letters = Math.max(20, (node.size[0] - 2 * MARGIN) / LETTER - 2);
  const lines = text.split("\n").reduce((sum, line) => sum + Math.ceil(line.length / letters), 0);
  widget.lines = Math.min(MOST_LINES, Math.max(1, lines));
  widget.value = text;
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
  node.setDirtyCanvas(true, true);
}

/** Calls `after` with the arguments, besides what other extensions have put there. */
function chain(prototype, name, after) {
  const before = prototype[name];
  prototype[name] = function (...args) {
    const result = before?.apply(this, args);
    after.apply(this, args);
    return result;
  };
}

app.registerExtension({
  name: "cascade.nodes",

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!isCascade(nodeData)) return;
    const colours = coloursOf(nodeData);
    if (colours) {
      chain(nodeType.prototype, "onNodeCreated", function () {
        this.color ??= colours[0];
        this.bgcolor ??= colours[1];
      });
    }
    chain(nodeType.prototype, "onExecuted", function (output) {
      if (Array.isArray(output?.text)) showUsed(this, output.text.join("\n"));
    });
  },
});
