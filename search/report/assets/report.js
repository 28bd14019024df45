// The page works without this; it adds labels under the mouse, cards of plans, panning, and ranges on demand.
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const tip = document.createElement('div');
  tip.id = 'tip';
  tip.hidden = true;
  document.body.append(tip);

  const show = (target) => {
    tip.textContent = target.getAttribute('aria-label');
    tip.hidden = false;
    const at = target.getBoundingClientRect(), own = tip.getBoundingClientRect();
    const left = Math.min(Math.max(at.left + at.width / 2 - own.width / 2, 6), innerWidth - own.width - 6);
    const above = at.top - own.height - 8;
    tip.style.left = `${left + scrollX}px`;
    tip.style.top = `${(above > 4 ? above : at.bottom + 8) + scrollY}px`;
  };
  const pick = (number) => {
    for (const card of all('article.plan')) card.hidden = card.id !== `plan-${number}`;
    for (const dot of all('.dot')) dot.classList.toggle('picked', dot.dataset.plan === number);
  };
  for (const dot of all('.dot')) {
    dot.addEventListener('mouseenter', () => show(dot));
    dot.addEventListener('focus', () => show(dot));
    for (const leave of ['mouseleave', 'blur']) dot.addEventListener(leave, () => { tip.hidden = true; });
    if (dot.dataset.plan) {
      dot.addEventListener('click', () => pick(dot.dataset.plan));
      dot.addEventListener('keydown', (e) => { if (e.key === 'Enter') pick(dot.dataset.plan); });
    }
  }

  const ranges = (node) => {
    const wanted = document.getElementById(`ranges-${node}`);
    for (const box of all('.graph .node')) box.classList.toggle('picked', box.dataset.layer === node);
    if (!wanted) return;
    wanted.hidden = false;
    wanted.parentNode.insertBefore(wanted, wanted.parentNode.querySelector('article.ranges'));
    wanted.scrollIntoView({ block: 'nearest' });
  };
  for (const frame of all('.graph')) {
    const svg = frame.querySelector('svg');
    const box = (node) => frame.querySelector(`.node[data-layer="${CSS.escape(node)}"]`);
    const centre = (node) => {
      const found = box(node);
      if (!found) return;
      const at = found.getBoundingClientRect(), own = frame.getBoundingClientRect();
      frame.scrollLeft += at.left - own.left - own.width / 2 + at.width / 2;
    };
    let from = null, moved = false;
    frame.addEventListener('pointerdown', (e) => {
      if (e.pointerType === 'mouse') from = [e.clientX, frame.scrollLeft];
      moved = false;
    });
    addEventListener('pointermove', (e) => {
      if (!from) return;
      moved = moved || Math.abs(e.clientX - from[0]) > 4;
      frame.scrollLeft = from[1] - (e.clientX - from[0]);
    });
    addEventListener('pointerup', () => { from = null; });
    for (const node of all('.node', frame)) {
      node.addEventListener('click', () => { if (!moved) ranges(node.dataset.layer); });
      node.addEventListener('keydown', (e) => { if (e.key === 'Enter') ranges(node.dataset.layer); });
    }
    for (const button of all('[data-zoom]')) button.addEventListener('click', () => {
      const part = (frame.scrollLeft + frame.clientWidth / 2) / svg.clientWidth;
      const widest = 2 * svg.dataset.width, least = Math.min(frame.clientWidth, svg.dataset.width);
      const width = Math.min(Math.max(svg.clientWidth * button.dataset.zoom, least), widest);
      svg.setAttribute('width', width);
      svg.removeAttribute('height');
      frame.scrollLeft = part * width - frame.clientWidth / 2;
    });
    for (const button of all('[data-jump]')) button.addEventListener('click', () => {
      centre(button.dataset.jump);
      ranges(button.dataset.jump);
    });
    const first = document.querySelector('[data-jump]');
    if (first) centre(first.dataset.jump);
  }
  addEventListener('beforeprint', () => { for (const part of all('details')) part.open = true; });
})();
