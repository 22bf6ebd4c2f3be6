// node decode.js FOLDER < JSON: what the page's own scripts make of codes, without a browser.
const fs = require("fs"), vm = require("vm");
const context = vm.createContext({ performance, console, atob, TextEncoder, TextDecoder, setTimeout, WorkerGlobalScope: class {} });
vm.runInContext("globalThis.self = globalThis", context);
for (const file of ["vendor/tf-core.es2017.min.js", "vendor/tf-backend-cpu.es2017.min.js", "page/decoder.js"]) {
  vm.runInContext(fs.readFileSync(`${process.argv[2]}/${file}`, "utf8"), context);
}
context.given = JSON.parse(fs.readFileSync(0, "utf8"));
const decode = "given.map(({ decoder, asked }) => { const d = pyrovae.load(decoder); return asked.map(([y, z]) => Array.from(d(y, z))); })";
console.log(JSON.stringify(vm.runInContext(decode, context)));
