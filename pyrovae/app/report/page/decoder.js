"use strict";
// A decoder in the page: a list of steps, each an operation named and given arguments as ATen's, run by TensorFlow.js.
// Every method of `operations` is one that report/decoder.py may ask for.
var pyrovae = (() => {
  const channelsLast = (x) => tf.transpose(x, [0, 2, 3, 1]);
  const channelsFirst = (x) => tf.transpose(x, [0, 3, 1, 2]);
  const axisOf = (x, dim) => (dim < 0 ? dim + x.rank : dim);
  const padding = ([h, w]) => [[0, 0], [h, h], [w, w], [0, 0]];

  function resized(x, size, byScale, resize) {
    const shape = size || byScale.map((scale, i) => Math.floor(x.shape[2 + i] * scale));
    return channelsFirst(resize(channelsLast(x), shape));
  }

  const operations = {
    abs(x) { return tf.abs(x); },
    add(a, b, alpha = 1) { return tf.add(a, alpha === 1 ? b : tf.mul(b, alpha)); },
    addmm(c, a, b, beta = 1, alpha = 1) { return tf.add(tf.mul(c, beta), tf.mul(tf.matMul(a, b), alpha)); },
    amax(x, dims, keep) { return tf.max(x, dims.length ? dims : undefined, keep); },
    bmm(a, b) { return tf.matMul(a, b); },
    cat(tensors, dim = 0) { return tf.concat(tensors, axisOf(tensors[0], dim)); },
    clamp(x, low, high) {
      const above = low === null ? x : tf.maximum(x, low);
      return high === null ? above : tf.minimum(above, high);
    },
    clamp_min(x, low) { return tf.maximum(x, low); },
    convolution(x, w, bias, stride, pad, dilation, transposed, extra) {
      const input = channelsLast(x);
      let y;
      if (transposed) {
        const size = [0, 1].map((i) => (x.shape[2 + i] - 1) * stride[i] - 2 * pad[i] + w.shape[2 + i] + extra[i]);
        y = tf.conv2dTranspose(
          input, tf.transpose(w, [2, 3, 1, 0]), [x.shape[0], ...size, w.shape[1]], stride, padding(pad));
      } else {
        y = tf.conv2d(input, tf.transpose(w, [2, 3, 1, 0]), stride, padding(pad), "NHWC", dilation);
      }
      return channelsFirst(bias === null ? y : tf.add(y, bias));
    },
    cos(x) { return tf.cos(x); },
    div(a, b) { return tf.div(a, b); },
    eq(a, b) { return tf.equal(a, b); },
    erf(x) { return tf.erf(x); },
    exp(x) { return tf.exp(x); },
    expand(x, shape) {
      const missing = shape.length - x.rank;
      return tf.broadcastTo(x, shape.map((size, i) => (size < 0 ? x.shape[i - missing] : size)));
    },
    expm1(x) { return tf.expm1(x); },
    ge(a, b) { return tf.greaterEqual(a, b); },
    getitem(list, i) { return list[i]; },
    gt(a, b) { return tf.greater(a, b); },
    le(a, b) { return tf.lessEqual(a, b); },
    log(x) { return tf.log(x); },
    log1p(x) { return tf.log1p(x); },
    logical_and(a, b) { return tf.logicalAnd(a, b); },
    logical_not(x) { return tf.logicalNot(x); },
    logical_or(a, b) { return tf.logicalOr(a, b); },
    lt(a, b) { return tf.less(a, b); },
    maximum(a, b) { return tf.maximum(a, b); },
    mean(x, dims, keep) { return tf.mean(x, dims || undefined, Boolean(keep)); },
    minimum(a, b) { return tf.minimum(a, b); },
    mm(a, b) { return tf.matMul(a, b); },
    mul(a, b) { return tf.mul(a, b); },
    neg(x) { return tf.neg(x); },
    permute(x, dims) { return tf.transpose(x, dims.map((dim) => axisOf(x, dim))); },
    pow(a, b) { return tf.pow(a, b); },
    reciprocal(x) { return tf.reciprocal(x); },
    relu(x) { return tf.relu(x); },
    rsqrt(x) { return tf.rsqrt(x); },
    select(x, dim, index) {
      const axis = axisOf(x, dim);
      return tf.squeeze(operations.slice(x, axis, index, index + 1 || null), [axis]);
    },
    sigmoid(x) { return tf.sigmoid(x); },
    sign(x) { return tf.sign(x); },
    sin(x) { return tf.sin(x); },
    slice(x, dim = 0, start = null, end = null, step = 1) {
      const axis = axisOf(x, dim), size = x.shape[axis];
      const place = (i) => Math.min(size, Math.max(0, i < 0 ? i + size : i));
      const [first, last] = [place(start ?? 0), place(end ?? size)];
      const begin = x.shape.map((_, i) => (i === axis ? first : 0));
      const stop = x.shape.map((length, i) => (i === axis ? last : length));
      return tf.stridedSlice(x, begin, stop, x.shape.map((_, i) => (i === axis ? step : 1)));
    },
    split_with_sizes(x, lengths, dim = 0) { return tf.split(x, lengths, axisOf(x, dim)); },
    sqrt(x) { return tf.sqrt(x); },
    squeeze(x, dims) {
      const axes = [dims].flat().map((dim) => axisOf(x, dim)).filter((axis) => x.shape[axis] === 1);
      return axes.length ? tf.squeeze(x, axes) : x;
    },
    sub(a, b, alpha = 1) { return tf.sub(a, alpha === 1 ? b : tf.mul(b, alpha)); },
    sum(x, dims, keep) { return tf.sum(x, dims || undefined, Boolean(keep)); },
    tanh(x) { return tf.tanh(x); },
    unsqueeze(x, dim) { return tf.expandDims(x, dim < 0 ? dim + x.rank + 1 : dim); },
    upsample_bilinear2d(x, size, corners, ...scales) {
      return resized(x, size, scales, (y, shape) => tf.image.resizeBilinear(y, shape, corners, !corners));
    },
    upsample_nearest2d(x, size, ...scales) {
      return resized(x, size, scales, (y, shape) => tf.image.resizeNearestNeighbor(y, shape));
    },
    var_mean(x, dims, correction, keep) {
      const { mean, variance } = tf.moments(x, dims || undefined, Boolean(keep)), count = x.size / variance.size;
      return [tf.mul(variance, count / (count - (correction ?? 1))), mean];
    },
    view(x, shape) { return tf.reshape(x, shape); },
    where(condition, a, b) { return tf.where(tf.cast(condition, "bool"), a, b); },
  };

  function half(bits) {
    const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
    if (exponent === 0) return sign * fraction * 2 ** -24;
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * 2 ** (exponent - 25) * (1024 + fraction);
  }

  function numbers(base64, dtype) {
    const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
    return dtype === "float32" ? new Float32Array(bytes.buffer) : Float32Array.from(new Uint16Array(bytes.buffer), half);
  }

  // `decoder(label, code)` gives the pixels of a code (numbers) as a Float32Array, by the steps for a label's number.
  function load({ dtype, weights, shapes, programs }) {
    const values = numbers(weights, dtype);
    let place = 0;
    const tensors = shapes.map((shape) => {
      const size = shape.reduce((a, b) => a * b, 1);
      place += size;
      return tf.tensor(values.subarray(place - size, place), shape);
    });
    return (label, code) => tf.tidy(() => {
      const { steps, output } = programs[label], found = [tf.tensor(Float32Array.from(code), [1, code.length])];
      const given = (argument) => {
        if (!Array.isArray(argument)) return argument;
        if (argument[0] === "value") return found[argument[1]];
        if (argument[0] === "weight") return tensors[argument[1]];
        return argument.map(given);
      };
      for (const [name, ...given_] of steps) found.push(operations[name](...given_.map(given)));
      return given(output).dataSync();
    });
  }

  return { load, numbers, operations };
})();
