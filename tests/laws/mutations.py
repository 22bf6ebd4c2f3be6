"""Does the suite bite? Break each formula in turn and see a test fail: ``python tests/laws/mutations.py [NAME ...]``.

A mutation is a list of edits (a fragment of pyrovae's source, which must occur exactly once in the engine, and what it
becomes). They are made in memory, while the package is imported, in a process of their own, which runs the suite until
its first failure. Exit 1 if a mutation survives; a fragment that has vanished stops everything, for then the list must
be mended.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENGINE = ["pyrovae/engine", "pyrovae/objectives", "pyrovae/evaluate"]
SUITE = [
    *("tests/laws/test_derivatives.py", "tests/laws/test_scored.py", "tests/laws/test_local.py"),
    *("tests/laws/test_identities.py", "tests/test_devices.py", "tests/laws/test_observed.py"),
    *("tests/laws/test_scales.py", "tests/laws/test_free_bits.py"),
    *("tests/laws/test_auxiliary.py", "tests/laws/test_structure.py", "tests/laws/test_separate.py"),
    *("tests/test_importance.py", "tests/test_objectives.py", "tests/laws/test_oracles.py"),
    *("tests/laws/test_wake_sleep.py", "tests/laws/test_subsampling.py", "tests/laws/test_reparameterised.py"),
    *("tests/laws/test_fixed.py", "tests/laws/test_left_out.py"),
    *("tests/laws/test_gradients.py", "tests/laws/test_bounds.py", "tests/laws/test_variances.py"),
    *("tests/test_late.py", "tests/test_updates.py"),
    *("tests/evaluate/test_psis.py", "tests/evaluate/test_discrete.py", "tests/evaluate/test_simulated.py"),
    *("tests/evaluate/test_whole.py", "tests/fuzz/test_objectives.py", "tests/test_programs.py"),
    "tests/test_enumerate.py",
]
#: By the first word of a mutation's name, what the suite begins with: where its killer is likely to be.
FIRST = {
    **dict.fromkeys(("RWS", "sleep", "TVO", "copies"), "tests/laws/test_wake_sleep.py"),
    "devices": "tests/test_devices.py",
    "sums": "tests/test_enumerate.py",
    "updates": "tests/test_updates.py",
    **dict.fromkeys(("modes", "methods"), "tests/test_programs.py"),
    "score": "tests/laws/test_scored.py",
    "local": "tests/laws/test_local.py",
    "KL": "tests/laws/test_free_bits.py",
    "structure": "tests/laws/test_structure.py",
    "folded": "tests/test_importance.py",
    "auxiliary": "tests/laws/test_auxiliary.py",
    "apart": "tests/laws/test_separate.py",
    "reparameterised": "tests/laws/test_reparameterised.py",
    "fixed z": "tests/laws/test_fixed.py",
    **dict.fromkeys(("late", "lazy modules"), "tests/test_late.py"),
    "left out": "tests/laws/test_left_out.py",
    "evaluated": "tests/evaluate/test_whole.py",
    "simulated": "tests/evaluate/test_simulated.py",
    "discrete": "tests/evaluate/test_discrete.py",
    "tail": "tests/evaluate/test_psis.py",
    "rounded": "tests/fuzz/test_objectives.py",
    "watched": "tests/laws/test_observed.py",
}

VALUE = "-(kept(bound) * particles.scale).sum() - (ascent"
DREG = "path - kl_weight * curvature(self.path_bound, log_w)"
SCORE = "dot(parts.kl_weight * (weights.path + weights.score), log_q, alive)"
REINFORCE = "dot(weights.reinforce, log_score, torch.isfinite(log_score.detach()))"
GROUPS = "log_w.unflatten(0, (self.groups, -1)).transpose(0, 1)"
SIGNAL = "-change(bound, log_w, mean_of_others(log_w, group))"
LOG_MEAN = "log_sum - math.log(number)"
OTHERS = "others(torch.cumsum, torch.add, 0.0, grouped) / (group - 1)"
REST = "others(torch.logcumsumexp, torch.logaddexp, -math.inf, log_share)"
MODEL = "total = dot(weights.model, log_p, alive)"
KL = "log_prior - log_guide"
AGAIN = "replayed_rng(*states), protected_buffers(guide)"
PROBE = "torch.enable_grad(), isolated_run(), validating, protected_buffers(model, guide),"
FIXED = 'fixed = self.gradient != "total"'

RWS = '(wn - wn.square(), zero) if self.gradient == "dreg" else (zero, wn)'
DREAM = "loss = -(log_q * particles.scale).sum()"
THERMODYNAMIC = "(correction * above - 1 - beta * above)"

CUT = "if self.seen.layout.sizes[-1:] != [number] and next(batches, None) is not None:"
TIES = "if name in tied or not torch.equal(log_prob(site), log_prob(other[name])):"

MUTATIONS: dict[str, list[tuple[str, str]]] = {
    # where programs run
    "devices: what names none is on the CPU": [('given["device"] = self.device', "pass")],
    "devices: a generator is taken along": [(' or given.get("generator") is not None', "")],
    "devices: a tensor is taken along": [("taken = func in CONVERTED and any(", "taken = False and any(")],
    "devices: the CPU says where as well": [
        ("if isinstance(a, Tensor) and not a.is_cpu:", "if isinstance(a, Tensor):")
    ],
    "devices: only modules are asked": [("found is not None or place is None or not may_differ(place)", "True")],
    "devices: a run that stopped leaves parameters": [("del store[name]", "pass")],
    "devices: buffers do not say where": [("(*module.parameters(), *module.buffers()))", "module.parameters())")],
    # sites that are summed out
    "sums: the prior is in the likelihood as well": [
        ("joint if log_prior is None else quotient(joint, log_prior)", "joint")
    ],
    "sums: each latent has all of the prior": [
        ('"absorbed": name not in (*prior[-1:], *data[:1])', '"absorbed": False')
    ],
    "sums: of the data alone": [("joint = self.over(list(self.sites))", "joint = self.over([*enumerated, *data])")],
    "sums: products of exponentials": [
        ("total = (x - top).exp().sum(dims)", "total, top = x.exp().sum(dims), torch.zeros_like(top)")
    ],
    "sums: the mean over values": [("torch.where(dead, 1.0, total).log()", "torch.where(dead, 1.0, total / 2).log()")],
    "sums: NaN where all is dead": [("torch.where(dead, 1.0, total).log()", "total.log()")],
    "sums: a mask takes the probabilities of values": [
        ('site = {**site, "mask": None, "fn": unmasked(site["fn"])}', "pass")
    ],
    "sums: in single precision": [("exact=not scaled", "exact=False")],
    "sums: what is replayed hangs on nothing": [("False, observed or replayed", 'msg["done"], observed')],
    "sums: of several scales": [('if not same(site["scale"], other["scale"]):', "if False:")],
    "sums: 0 by 0": [
        ("return torch.where(dead, log_a, log_a - torch.where(dead, 0.0, log_b))", "return log_a - log_b")
    ],
    "sums: the KL has the share": [('site = {**site, "fn": conditional(site["fn"])}', "pass")],
    "sums: the KL given all latents": [
        ("before = self.prior[: self.prior.index(name)]", "before = [n for n in self.prior if n != name]")
    ],
    "sums: draws are of the prior": [
        (
            "sites, first_dim = run_at(model, args, kwargs, values, layout.num",
            "sites, first_dim = run_at(model, args, kwargs, {}, layout.num",
        )
    ],
    "sums: chains start anywhere": [("sums=sums))", "sums=False))")],
    "sums: weights of the guide's marks swapped": [
        ("model = Weigh(kl_weight, likelihood_weight)(model)", "model = Weigh(likelihood_weight, kl_weight)(model)")
    ],
    "sums: of the guide's marks for each particle": [
        ("torch.stack(bounds).sum() / num_particles", "torch.stack(bounds).sum()")
    ],
    # the bounds
    "IWAE without log K": [(LOG_MEAN, "log_sum")],
    "IWAE with the log of another number": [(LOG_MEAN, LOG_MEAN.replace("number", "(number + 1)"))],
    "sum of wn * log w as the bound": [
        ("return value, scaled.softmax(0)", "return (scaled.softmax(0) * log_w).sum(0), scaled.softmax(0)")
    ],
    "softmax of plus the loss": [("log_w if power == 1 else power * log_w", "-power * log_w")],
    "reported: RWS without log K": [
        ("return torch.logsumexp(log_w, 0) - math.log(log_w.shape[0])", "return torch.logsumexp(log_w, 0)")
    ],
    "MIWAE: M and K swapped": [(GROUPS, GROUPS.replace("(self.groups, -1)", "(-1, self.groups)"))],
    "MIWAE: normalised over the wrong axis": [(GROUPS, "log_w.unflatten(0, (self.groups, -1))")],
    "MIWAE: groups interleaved": [(GROUPS, "log_w.unflatten(0, (-1, self.groups))")],
    "MIWAE: sum over groups": [("else value.mean(0)", "else value.sum(0)")],
    "MIWAE: coefficients of a sum over groups": [("flatten(0, 1) / self.groups", "flatten(0, 1)")],
    "PIWAE: guide follows IWAE": [("return super().bound", "return PowerMeans({1.0: 1.0})")],
    "PIWAE: guide receives both losses": [
        ("return super().bound", "return lambda log_w: super(PIWAE, self).bound(log_w) + self.bound(log_w)")
    ],
    "PIWAE: model follows MIWAE": [("slope(self.bound, log_w)", "slope(self.path_bound, log_w)")],
    # wake, sleep and the thermodynamic integral
    "RWS: the guide flees the posterior": [(RWS, RWS.replace("(zero, wn)", "(zero, -wn)"))],
    "RWS: all particles alike": [(RWS, RWS.replace("(zero, wn)", "(zero, torch.full_like(wn, 1 / len(wn)))"))],
    "RWS: dreg without the square": [(RWS, RWS.replace("wn - wn.square()", "wn"))],
    "RWS: dreg of IWAE": [(RWS, RWS.replace("wn - wn.square()", "wn.square()"))],
    "RWS: the model follows the ELBO": [
        ("ParticleWeights(wn, path, score", "ParticleWeights(wn / wn * 0.5, path, score")
    ],
    "sleep: ascends": [(DREAM, DREAM.replace("-(", "("))],
    "sleep: a sum over dreams": [("torch.stack(dreams).mean()", "torch.stack(dreams).sum()")],
    "sleep: divided by the dreams twice": [("torch.stack(dreams).mean()", "torch.stack(dreams).mean() / len(dreams)")],
    "sleep: on the data": [("args = (written(args[0], data, dreamt), *args[1:])", "pass")],
    "sleep: rows of another place": [('x.index_copy(0, dreamt[frame.name]["value"], value)', "x")],
    "sleep: noise has a density": [("Particles.of(run, {}, noise=noise, scaled", "Particles.of(run, {}, scaled")],
    "sleep: noise has no score": [("if score is None:", "if True:")],
    "sleep: factors of latents ignored": [("if len(tied) > 1 or any(", "if any(isinstance(None, Unit) and ")],
    "sleep: Deltas not inverted": [("if found := sources(run, dreamt):", "if found := {}:")],
    "TVO: right sum": [("(following - beta, beta, v,", "(following - beta, following, v,")],
    "TVO: weights of the next temperature": [
        ("v = (beta * log_w).softmax(0) if beta", "v = (following * log_w).softmax(0) if beta")
    ],
    "TVO: no correction for K": [(THERMODYNAMIC, "(above - 1 - beta * above)")],
    "TVO: score without the weights' own slope": [(THERMODYNAMIC, "(correction * above - 1)")],
    "TVO: model without the weights' own slope": [("step * v * (1 + beta * above)", "step * v")],
    "TVO: points not on a logarithm": [("_SMALLEST ** ((last - i) / last)", "1 - (last - i) / last * (1 - _SMALLEST)")],
    "CIWAE: beta on the wrong side": [
        ("(0.0, self.beta), (1.0, 1 - self.beta)", "(1.0, self.beta), (0.0, 1 - self.beta)")
    ],
    "Renyi: not divided by 1 - alpha": [("powers(1 / power, log_sum - math.log(number))", LOG_MEAN)],
    "Renyi: alpha for 1 - alpha": [("PowerMeans({1 - self.alpha: 1.0})", "PowerMeans({self.alpha: 1.0})")],
    "Renyi: imprecise near alpha = 1": [("abs(power) < 0.1", "abs(power) < 0.0")],
    "Renyi: no log of a mean far below 1 near alpha = 1": [("near = less > -0.5", "near = less > -2.0")],
    "VR-max: the worst particle": [("log_w.max(0, keepdim=True)", "log_w.min(0, keepdim=True)")],
    "ELBO: free bits datum by datum": [
        ("torch.clamp(mean, min=self.free_bits).sum()", "kl.flatten(0, -2).clamp(min=self.free_bits).mean(0).sum()")
    ],
    "ELBO: free bits not per datum": [
        (
            "self.kl_weight * paid * (torch.ones_like(of_data[0, ..., 0]) * particles.scale).sum()",
            "self.kl_weight * paid",
        )
    ],
    "KL: closed form whatever the guide draws later": [("parents_first(particles, name) and same", "same")],
    "KL: of the base of a class that alters it": [(" or not all(map(has_own_law, (*layers(q), *layers(p))))", "")],
    "KL: masks of distributions ignored": [("mask = mask & aligned(fn._mask, fn.event_dim * apart)", "pass")],
    "KL: the guide's masks are the model's": [("if kl is None or q.mask is not p.mask", "if kl is None")],
    "fixed z: auxiliary draws stay": [("draw.detach() - unrows(part", "draw.detach() - 0 * unrows(part")],
    "fixed z: auxiliary draws flee": [("draw.detach() - unrows(part", "draw.detach() + unrows(part")],
    "fixed z: the transposed Jacobian": [("torch.linalg.solve(along, off)", "torch.linalg.solve(along.mT, off)")],
    "reparameterised: an update's draw is a site": [("or untraced(site))", ")")],
    "reparameterised: its density is likelihood": [("latent(self.weighed) | self.carried", "latent(self.weighed)")],
    # what is reported
    "reported: sum of wn * log w": [
        (VALUE, "-((torch.softmax(log_w, 0) * log_w).sum(0).detach() * particles.scale).sum() - (ascent")
    ],
    "reported: the surrogate": [
        ("particles.scale).sum() - (ascent - ascent.detach())", "particles.scale).sum() - ascent")
    ],
    "reported: mean over data": [(VALUE, VALUE.replace("sum", "mean"))],
    "reported: N/B inside the logsumexp": [(VALUE, "-self.bound((log_w * particles.scale).detach()).sum() - (ascent")],
    "reported without gradient: N/B inside the logsumexp": [
        ("-(kept(self.bound(log_w)) * particles.scale).sum()", "-self.bound(log_w * particles.scale).sum()")
    ],
    "reported without gradient: mean over data": [
        ("-(kept(self.bound(log_w)) * particles.scale).sum()", "-(self.bound(log_w) * particles.scale).mean()")
    ],
    # what is followed
    "followed: N/B inside the logsumexp": [
        ("self.followed_weights(log_w.detach(),", "self.followed_weights(log_w.detach() * particles.scale,")
    ],
    "followed: mean over data": [("torch.where(alive, value, 0.0)).sum()", "torch.where(alive, value, 0.0)).mean()")],
    "followed: no N/B": [("eps ** 2, scale=particles.scale", "eps ** 2, scale=1.0")],
    "weights not detached": [
        ("self.followed_weights(log_w.detach(),", "self.followed_weights(log_w,"),
    ],
    "dreg: squares the weight whatever b": [(DREG, "path**2")],
    "dreg: forgets kl_weight": [(DREG, DREG.replace("kl_weight * ", ""))],
    "dreg: the curvature of another power": [("power * (s - s.square())", "s - s.square()")],
    "dreg: the whole row of second derivatives": [("else second[own]", "else second.sum(0)")],
    "dreg: wrong sign": [(DREG, DREG.replace("-", "+"))],
    "dreg: curvature of the model's bound": [(DREG, DREG.replace("path_bound", "bound"))],
    "dreg: squares log w": [(DREG, "path * log_w**2")],
    "stl sold as total": [
        (FIXED, "fixed = True"),
        ('-path if self.gradient == "total" else ', ""),
    ],
    "total sold as stl": [(FIXED, "fixed = False")],
    "score: wrong sign": [(SCORE, SCORE.replace("parts.kl_weight *", "-parts.kl_weight *"))],
    "score: without kl_weight": [(SCORE, SCORE.replace("parts.kl_weight * ", ""))],
    "score: samples not held fixed": [
        ("if not cuttable:", "if False:"),
        ('log_prob(s, duplicate(s["value"], Tensor.detach))', "log_prob(s)"),
    ],
    "score: only the leading layer held fixed": [("if not cuttable:", "if False:")],
    "model follows the path's weights": [(MODEL, MODEL.replace("model", "path"))],
    "the ratio of path to model is left out": [("partial(mul, at_site)", "partial(mul, 1.0)")],
    "the ratio is its inverse": [
        (
            "path / torch.where(dropped, 1.0, model)",
            "model / torch.where(dropped, 1.0, path)",
        )
    ],
    "path follows the model's weights": [
        ("dot(weights.path, log_p, alive), leaves", "dot(weights.model, log_p, alive), leaves")
    ],
    "log q forgets kl_weight": [
        ("dot(weights.path * parts.kl_weight, parts.guide, alive)", "dot(weights.path, parts.guide, alive)")
    ],
    "reinforce: dropped": [(REINFORCE, "0 * " + REINFORCE)],
    "reinforce: wrong sign": [(REINFORCE, "-" + REINFORCE)],
    "reinforce: times kl_weight": [(REINFORCE, "parts.kl_weight * " + REINFORCE)],
    "reinforce: tempered": [("tempered=False", "tempered=True")],
    "reinforce: baseline counted twice": [(SIGNAL, "-bound(log_w) - 2 * change" + SIGNAL.removeprefix("-change"))],
    "reinforce: no baseline": [(SIGNAL, "bound(log_w).expand_as(log_w).clone()")],
    "reinforce: baseline has the particle itself": [(OTHERS, "grouped.mean(0, keepdim=True).expand_as(grouped)")],
    "reinforce: baseline over all groups": [
        ("x.unflatten(0, (-1, group))", "x.unflatten(0, (1, -1))"),
        (OTHERS, OTHERS.replace("(group - 1)", "(len(x) - 1)")),
    ],
    "reinforce: the others' weight by a difference": [(REST, "(1 - log_share.exp()).log()")],
    "reinforce: the others' weight before the particle alone": [("return join(before, after)", "return before")],
    "reinforce: small changes by a difference": [("more.abs() < 0.5", "more.abs() < 0.0")],
    "reinforce: large changes by an expansion": [("more.abs() < 0.5", "more.abs() < 1e9")],
    "reinforce: particles without weight have no score": [(REINFORCE, "dot(weights.reinforce, log_score, alive)")],
    # single sites and elements
    "scales: by what folded particles draw": [("not same(of_particles, of_particles[0])", "False")],
    "local: a plate inside of a datum taken for the particles": [
        ("*[1] * (dim - t.dim()), *t.shape[1:]", "*t.shape[1:]")
    ],
    "local: the whole weight as the signal": [
        ("part, gone = reach.part(plates.get(name, {}))", "part, gone = whole, lost")
    ],
    "local: no baseline": [("target = target + mean_of_others", "target = target + 0 * mean_of_others")],
    "local: baseline of all particles": [
        ("torch.where(gone > 0, -math.inf, part), group)", "part.mean(0).expand_as(part), group)")
    ],
    "local: terms outside of the plate left out": [
        (
            "parts.append(term.sum(summed, keepdim=True) if summed else term)",
            "parts.append(term.sum(summed, keepdim=True) * (not plates or any(key in plates for key in around)))",
        )
    ],
    "local: a plate of the same place taken for the same": [
        (
            "*(key[1] for key in around if key in plates)",
            "*(key[1] for key in around if key[1:] in {k[1:] for k in plates})",
        )
    ],
    "local: later draws carry nothing on": [(" and all(key in s for s in stacks)", "")],
    "local: a scored site is drawn last": [("order.index(name) if name in order", "len(order) if name in order")],
    "local: dead terms make a remainder dead": [
        ("torch.where(lost > gone, -math.inf, whole - part)", "torch.where(lost > 0, -math.inf, whole - part)")
    ],
    "local: dead terms are left out": [("torch.where(lost > gone, -math.inf, whole - part)", "whole - part")],
    "local: no N/B": [("signal, 0.0) * scale * torch", "signal, 0.0) * torch")],
    "local: without tempering": [
        ("weight * particles.tempering.get((role, name), 1.0) * log_prob", "weight * log_prob")
    ],
    "local: without kl_weight": [('("model", particles.prior, kl_weight)', '("model", particles.prior, 1.0)')],
    "local: without likelihood_weight": [
        ('("model", particles.likelihood, likelihood_weight)', '("model", particles.likelihood, 1.0)')
    ],
    "local: follows the model's bound": [("scores, terms, self.path_bound, self", "scores, terms, self.bound, self")],
    "local: free bits without the KL": [("terms.append((frames(particles.guide[name]), -of_site.detach()))", "pass")],
    "local: free bits without the likelihood": [
        ('("model", particles.likelihood, self.likelihood_weight), ("model", *rest)', '("model", *rest)')
    ],
    "score: none where the log-weights have no gradient": [("in (log_w, *scores.values()))", "in (log_w,))")],
    "score: noise alone in linear bounds": [("lp.detach() if name in cut else lp", "lp")],
    "score: the slope of a bound that is not linear left out": [
        (
            "isinstance(bound, PowerMeans) and bound.linear(particles.layout.num_particles)",
            "isinstance(bound, PowerMeans)",
        )
    ],
    "score: rejection's own log q left out": [
        ('if name in particles.guide and not particles.guide[name]["fn"].has_rsample', "if name in particles.guide")
    ],
    "score: rejection has none": [("0.0 if fn.has_rsample and not rejects(fn) else", "0.0 if fn.has_rsample else")],
    "score: rejection has all": [("return fn.score_parts(value).score_function", "return fn.log_prob(value)")],
    "score: not pulled back": [("value = transform.inv(value)", "pass")],
    "score: masked": [
        (
            "        return score_of(fn.base_dist, value, rsample)\n    if",
            "        return torch.where(fn._mask, score_of(fn.base_dist, value, rsample), 0.0)\n    if",
        )
    ],
    "score: masked by a handler": [
        ("0.0 if fn.has_rsample and", '0.0 if site["mask"] is not None or fn.has_rsample and')
    ],
    "copies: the soft draw is lost": [("        setattr(new, name, duplicate(tensor, how))", "        pass")],
    "copies: the soft draw is not cut off": [
        ("setattr(new, name, duplicate(tensor, how))", "setattr(new, name, tensor)")
    ],
    "copies: the path along the soft draw is lost": [
        (
            "live = [tensor for value in drawn for tensor in (value, *attached(value).values())]",
            "live = [tensor for value in drawn for tensor in (value, *(0 * t for t in attached(value).values()))]",
        )
    ],
    "copies: the ratio is not that of the soft draw": [
        ("for tensor in (copy, *attached(copy).values()):", "for tensor in (copy,):")
    ],
    "reinforce: particles without weight cannot be replaced": [("dead, log_new.exp(),", "dead, 0.0,")],
    "reinforce: the first portion of one's own bound alone": [
        ("torch.cat(replaced) - bound(log_w)", "replaced[0].expand_as(target) - bound(log_w)")
    ],
    # the log-weight
    "kl_weight on the likelihood": [
        (
            "((log_likelihood, likelihood_weight), (kl, kl_weight))",
            "((log_likelihood, kl_weight), (kl, likelihood_weight))",
        )
    ],
    "kl_weight ignored": [("(kl, kl_weight))", "(kl, 1.0))")],
    "log q added": [(KL, KL.replace("-", "+"))],
    "masks ignored": [("return torch.zeros_like(lp) if mask is False else torch.where(mask, lp, 0.0)", "return lp")],
    "model factors in the prior": [
        (
            "return latent(self.weighed) | self.carried",
            'return {name: site for name, site in self.model.items() if name not in ("x", "data")}',
        ),
        ("in observed(self.weighed).items() if name not in self.carried", 'in self.model.items() if name == "x"'),
    ],
    "guide factors ignored": [
        ('(of_model is None or says_rsample(inner) != says_rsample(of_model["fn"]))', "False"),
    ],
    "common scale ignored": [("return per_datum(first, layout), {}", "return 1.0, {}")],
    "the guide's tempering not in dreg": [("next(iter(particles.guide_tempering), 1.0)", "1.0")],
    "tempering outside of the bound": [("lp = lp * self.tempering[role, name]", "pass")],
    # what of a pair is seen again
    "structure: one program may subsample alone": [("refuse_unlike_subsamples(seen)", "pass")],
    "structure: a structure once seen is seen for good": [("elif found.structure not in known:", "elif not known:")],
    "structure: plates of a later call lie where particles are": [
        ("max(self.nesting, seen.nesting)", "self.nesting or seen.nesting")
    ],
    "structure: of sizes nothing is known": [("sizes.setdefault(size, len(sizes) + 1)", "0")],
    "structure: a guide's plate by its name": [
        ("places = [{key[1:] for key in frames(site)} for site in guide]", "places = [frames(site) for site in guide]"),
        ("all(key[1:] in p for p in places)", "all(key in p for p in places)"),
    ],
    "structure: a model's plate by its size alone": [
        ("all(key in s for s in stacks) and", "all(key[1:] in {k[1:] for k in s} for s in stacks) and")
    ],
    "structure: a site of two shapes": [
        ("check_model_guide_match(*(SimpleNamespace(nodes=sites) for sites in (wanted, drawn)))", "pass")
    ],
    "structure: joint weights without a word": [("if strays := seen.strays:", "if strays := []:")],
    # particles one after the other
    "apart: all models run on the first one's copies": [("fn.split(value)[run]", "fn.split(value)[0]")],
    "apart: what a run lacks counts": [
        ("torch.zeros_like(known[0]) if v is None", "torch.ones_like(known[0]) if v is None")
    ],
    "apart: draws are held fixed by their stack alone": [
        ("return [v for v in fn.values if v is not None] if isinstance(fn, Stacked) else", "return")
    ],
    "apart: no masks": [('"mask": joined_mask(parts, nesting)', '"mask": None')],
    "apart: later runs are not checked": [("for sites in found.runs:", "for sites in found.runs[:1]:")],
    "apart: without a word": [
        ('        warn(\n            "particles run', '        str(\n            "particles run')
    ],
    "apart: units of one site together": [
        ("return Stacked(parts, fn.values, fn.nesting + fn.event_dim) if apart else None", "return None")
    ],
    # what is folded
    "folded: folding repeats whatever has as many rows": [("            if a.dim() > 1:", "            if False:")],
    "folded: folding repeats the first argument, data or not": [
        ("if (sizes := particles.layout.sizes) not in ([rows], []):", "if False:")
    ],
    # what of a guide's run counts
    "auxiliary: the model's observations in log q": [
        ('(not site["is_observed"] or is_own_factor(site, model.get(name)))', "True")
    ],
    "auxiliary: the model's factors in log q": [
        ("(of_model is None or says_rsample(inner)", "(True or says_rsample(inner)")
    ],
    "auxiliary: noise in log q": [("for name in list(own) if name in noise}", "for name in list(own) if name in ()}")],
    "auxiliary: noise without its score": [
        ("for name, site in (particles.guide | particles.noise).items()", "for name, site in particles.guide.items()")
    ],
    "auxiliary: noise held fixed": [
        (
            "for name, value in drawn(proposed).items() if name not in noise}",
            "for name, value in drawn(proposed).items()}",
        )
    ],
    "auxiliary: what Deltas are computed from as noise": [
        ("Auxiliary(frozenset(own) - read,", "Auxiliary(frozenset(own),")
    ],
    "auxiliary: Deltas of Deltas cut off": [
        ("get_provenance(parts_of(mass)) if name in self.own and", "frozenset() if name in self.own and")
    ],
    # what rounding does to large log-weights
    "rounded: shares by a difference": [("return value, scaled.softmax(0)", "return value, (scaled - log_sum).exp()")],
    "rounded: TVO of what was not shifted": [
        ("torch.where(torch.isfinite(best), best, 0.0)  #", "torch.zeros_like(best)  #")
    ],
    # dead particles, state
    "a hopeless datum has a gradient": [
        ("usable = torch.isfinite(bound)", "usable = torch.ones_like(bound, dtype=torch.bool)")
    ],
    "dead particles not masked": [("torch.where(alive, value, 0.0)).sum()", "value).sum()")],
    "dropout drawn anew in the second run": [(AGAIN, "protected_buffers(guide)")],
    "batch norm moved by the second run": [(AGAIN, "replayed_rng(*states)")],
    "methods: buffers moved by the second run": [(AGAIN, "replayed_rng(*states), protected_buffers()")],
    "probing draws from the generator": [(PROBE, PROBE.replace("isolated_run(), ", ""))],
    "probing moves batch norm": [(PROBE, PROBE.replace(", protected_buffers(model, guide)", ""))],
    "methods: buffers moved by a look": [(PROBE, PROBE.replace("(model, guide)", "()"))],
    "methods: buffers moved by measuring": [("protected_buffers(*programs), on_forward", "on_forward")],
    "methods: closed-over modules are not found": [("in function.__closure__ or ()", "in ()")],
    # what a pair reaches
    # what moves parameters
    "updates: steps are not counted": [("self.all += 1", "self.all += 0")],
    "updates: hooks are passed over": [("not (optimizer._optimizer_step_pre_hooks or", "not (False and")],
    "updates: a patched step is passed over": [('"step" not in vars(optimizer)', "True")],
    "updates: one group's options for all": [
        ("for group, own, entries, count in zip(groups,", "for group, own, entries, count in zip(groups[:1] * 9,")
    ],
    "updates: counts of steps that were replaced": [("if [id(entries", "if not self.views and [id(entries")],
    # what is left out of a step
    "left out: what is NaN as well": [("dead = bound == -math.inf", "dead = ~torch.isfinite(bound)")],
    "left out: all of a batch": [
        ("torch.where(dead, 0.0 * bound.detach().amax(), bound)", "torch.where(dead, 0.0, bound)")
    ],
    "left out: counted by cells": [("dead.reshape(-1, dead.shape[-1]).any(0) if dead.dim() > 1 else dead", "dead")],
    "left out: in evaluations too": [
        ("        return bound\n    dead =", "        pass\n    dead ="),
        ("    counts.append(", "    (counts if counts is not None else []).append("),
    ],
    "left out: a mean over the others": [
        ("0.0 * bound.detach().amax(), bound)", "0.0 * bound.detach().amax(), bound * len(bound) / (~dead).sum())")
    ],
    "left out: free bits pay for all": [
        (
            "-kept(-(torch.as_tensor(cost) * particles.scale).mean(0)).sum()",
            "(torch.as_tensor(cost) * particles.scale).mean(0).sum()",
        )
    ],
    "lazy modules: the look's noise once more": [("rng_snapshot() if any(lazy) else None", "None")],
    "lazy modules: the look's data in their buffers": [("            if is_lazy(module):", "            if False:")],
    "late: what is reached late is nobody's": [("                    found.append(leaf)", "                    pass")],
    "late: what a run makes itself is a parameter": [
        ("(id(tensor) in stored or id(tensor) in lasting)", "not torch.is_inference(tensor)")
    ],
    "late: copies of samples are parameters": [("copied.requires_grad_(False)", "copied.requires_grad_(True)")],
    "late: late parameters overwrite each other": [("leaf.later.{len(self.loose)}", "leaf.later")],
    # evaluations
    "evaluated: joint weights are cut": [(CUT, "if False:")],
    "evaluated: data are cut along another plate": [
        ("self.seen.layout.sizes[-1:] != [number]", "not self.seen.layout.sizes")
    ],
    "evaluated: a random subsample stays": [("self.taken = self.drawn.keys() - ", "self.taken = set() and ")],
    "evaluated: the batch's own plate is taken whole": [("set() if given else {f.name for f in own}", "set()")],
    "evaluated: a given part is all": [("if oversampling(f) != 1 and (f.dim, f.size) not in shared:", "if False:")],
    "evaluated: data that follow no index are repeated": [
        ("value.shape[axis] != frame.size", "value.shape[axis] not in (1, frame.size)")
    ],
    "watched: no look at the data": [("        check_observed(self.model, again=again)", "        return")],
    "watched: later batches pass": [("check(batch := taken(batch), self.done)", "batch = taken(batch)")],
    "watched: later batches keep their type": [("check(batch := taken(batch), self.done)", "check(batch, self.done)")],
    "watched: only what was computed is judged": [
        ("        if not self.fine(batch):", "        if self.fine(batch) is None:")
    ],
    "watched: what was computed passes": [("        if None in self.columns:\n            return None\n", "")],
    "watched: data count from their batch": [("name, first=first)", "name)")],
    "watched: views begin where their batch does": [
        ("own.storage_offset() + offset)", "own.storage_offset())"),
        ("view = list(value.shape), list(value.stride()),", "view = list(own.shape), list(own.stride()),"),
    ],
    "watched: batches are as long as the first": [("(n, s) == (self.rows, self.stride)", "False")],
    "watched: masks hide nothing": [("bad = bad & mask[", "bad = bad | ~mask[")],
    "watched: what is missing passes everywhere": [
        ("bad = bad & ~(missing & known[", "bad = bad & ~(missing | known[")
    ],
    "watched: infinite data are missing": [("x[~x.isnan()] if self.skips_nan", "x[x.isfinite()] if self.skips_nan")],
    "watched: bounds of latents are data's": [("if again is not None and (limits := bounds(fn)):", "if False:")],
    "watched: the same latents tell of bounds": [("isolated_rng(OTHER), protected", "isolated_rng(), protected")],
    "watched: extremes lie on the edge": [
        ("inside(torch.stack(torch.aminmax(x)), support).all()", "inside(x.mean(), support)")
    ],
    "watched: fractions count": [
        ("inside(ends[:2], support).all() & ends[2:].eq(0).all()", "inside(ends[:2], support).all()")
    ],
    "watched: greys are bits": [
        ("torch.addcmul(x, x, x, value=-1))).eq(0)", "torch.addcmul(x, x, x, value=-1))).ge(0)")
    ],
    "watched: bounds of each datum are extremes": [("    if varies or not known", "    if not known")],
    "watched: what is masked reaches gradients": [
        ('value = site["value"] if whole else seen_value(site)', 'value = site["value"]')
    ],
    "watched: integers stay": [("yield from (Taken(dtype, dtype or default) for dtype in known)", "yield Taken()")],
    "watched: integers never stay": [
        ("Taken(dtype, integers) for integers in (torch.int64, None)", "Taken(dtype, default) for _ in (0,)")
    ],
    "watched: reals keep their type": [
        ("kind = self.dtype if a.is_floating_point()", "kind = None if a.is_floating_point()")
    ],
    "watched: labels become reals": [("self.integers if first and not", "self.integers if not")],
    "simulated: factors of latents pass": [(TIES, "if False:")],
    "simulated: ties are told by marks alone": [(TIES, "if name in tied:")],
    "simulated: ties are told by values alone": [(TIES, TIES.replace("name in tied or ", ""))],
    "simulated: factors free of latents do not pass": [(TIES, "if True:")],
    "tail: full of the largest weight, it is infinite": [
        ("torch.where(full, -math.inf,", "torch.where(full, math.inf,")
    ],
    "modes: what is frozen trains": [("child.training or not root.training", "True")],
    "modes: a root in eval mode stays in it": [("child.training or not root.training", "child.training")],
    "modes: a program below another counts as outermost": [("if root not in below", "")],
    "modes: they are not given back": [("        set_modes(found)", "        pass")],
    "modes: what evaluates does not give them back": [("            set_modes(modes)\n\n", "            pass\n\n")],
    "tail: of four, it is minus infinite": [(" & (x.shape[1] > 5)", "")],
    "discrete: the largest weight counted in one pass": [("mine + others", "torch.maximum(mine, others)")],
    "discrete: counted exactly": [("log_w >= top - TIED).sum(0)", "log_w >= top).sum(0)")],
    "discrete: the effective sample size alone": [("share > SHARE", "share > 2")],
    "discrete: the count alone": [
        ("self.number.minimum(sums.ess), sums.ess)", "self.number.double(), self.number.double())")
    ],
    "discrete: as if continuous": [("any(discrete) and all(discrete)", "False")],
    "discrete: as soon as one latent is": [("any(discrete) and all(discrete)", "any(discrete)")],
}


def edits(name: str) -> dict[Path, str]:
    """The package's files that a mutation changes, and their changed text."""
    texts = {path: path.read_text() for folder in ENGINE for path in sorted((ROOT / folder).glob("*.py"))}
    changed = {}
    for old, new in MUTATIONS[name]:
        found = [path for path, text in texts.items() for _ in range(text.count(old))]
        if len(found) != 1:
            raise LookupError(
                f'mutation "{name}": {old!r} occurs {len(found)} times in the engine, not once: mend the list'
            )
        changed[found[0]] = texts[found[0]] = texts[found[0]].replace(old, new)
    return changed


def apply(name: str) -> None:
    """Import pyrovae with the mutation in it; its files stay as they are."""
    if "pyrovae" in sys.modules:
        raise RuntimeError("pyrovae is imported already: a mutation must come first")
    changed = {str(path): text for path, text in edits(name).items()}

    class Loader(importlib.machinery.SourceFileLoader):
        def get_code(self, fullname: str):
            return compile(changed[self.path], self.path, "exec")

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, fullname, path=None, target=None):
            spec = importlib.machinery.PathFinder.find_spec(fullname, path) if fullname.startswith("pyrovae") else None
            if spec is not None and spec.origin in changed:
                spec.loader = Loader(fullname, spec.origin)
                return spec
            return None

    sys.meta_path.insert(0, Finder())


class FirstFailure:
    """A pytest plugin that keeps the name of the first test to fail."""

    name: str | None = None

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed and self.name is None:
            self.name = report.nodeid.removeprefix("tests/")


def attack(name: str) -> tuple[str, str | None, float, str]:
    """The first test that fails under a mutation (None: it survives), and what a suite that broke itself said."""
    import pytest

    start, first = time.monotonic(), FirstFailure()
    apply(name)
    with tempfile.TemporaryFile("w+") as output:
        for descriptor in (1, 2):
            os.dup2(output.fileno(), descriptor)
        likely = FIRST.get(name.split(":")[0], SUITE[0])
        for files in ([likely], [file for file in SUITE if file != likely]):  # most die in the first, collected alone
            code = pytest.main([*files, "-x", "-q", "--tb=line", "-p", "no:cacheprovider"], plugins=[first])
            if code != 0:
                break
        sys.stdout.flush()
        output.seek(0)
        broken = output.read() if first.name is None and code != 0 else ""
    return name, first.name, time.monotonic() - start, broken


def preload() -> None:
    """What every process needs but the package itself, so that forks start in no time."""
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    for module in ("pytest", "torch", "torchvision", "pyro.infer.autoguide", "scipy.stats", "sklearn.datasets"):
        importlib.import_module(module)
    importlib.import_module("torch").set_num_threads(1)


def main(chosen: list[str]) -> int:
    names = chosen or list(MUTATIONS)
    for name in names:
        edits(name)
    preload()
    survivors = []
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        for name, killer, seconds, broken in pool.imap(attack, names):
            if broken:
                raise RuntimeError(f'mutation "{name}" stopped the suite itself:\n{broken}')
            print(f"{'killed  ' if killer else 'SURVIVED'} {seconds:5.1f} s  {name:<45} {killer or ''}", flush=True)
            if killer is None:
                survivors.append(name)
    print(f"{len(names) - len(survivors)} of {len(names)} mutations killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
