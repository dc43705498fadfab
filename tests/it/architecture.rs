//! Dependencies point one way, and `unsafe`, heavy crates and printing stay in the places listed
//! here.
//!
//! A listed exception that the sources no longer need fails a test too, so that the lists only
//! shrink.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use crate::support::files::{files_below, root};
use crate::support::source::{Source, sources};

/// Modules of the main package that use one which `src/lib.rs` lists after them.
const AGAINST_THE_ORDER: &[(&str, &str)] = &[];

/// Modules of the main package that depend on each other.
const CIRCLES: &[&[&str]] = &[];

/// Files and folders with `unsafe`, each with its reason.
const UNSAFE: &[(&str, &str)] = &[
    ("src/allocator.rs", "the global allocator"),
    ("src/base/lock.rs", "libc: the host's name"),
    ("src/base/output.rs", "libc: duplicates a descriptor, asks for permissions"),
    ("src/base/signal.rs", "libc: asks whether a signal is ignored, ignores one"),
    ("src/collective/bf16.rs", "a reduction that MPI calls with raw buffers"),
    ("src/collective/mpi.rs", "lends memory of tensors to MPI"),
    ("src/collective/nccl/", "loads NCCL and lends memory of tensors to it"),
    (
        "src/device/memory.rs",
        "libc: settings of the allocator; reads a variable and exits where memory has run out",
    ),
    ("src/device/mkl.rs", "a function that MKL calls"),
    ("src/device/mod.rs", "loads the CUDA half of libtorch and sets its flags"),
    ("src/kernels/", "loops over the memory of tensors, C++ over libtorch"),
    ("src/serve/server.rs", "libc: sets the allocator's threshold"),
    ("src/tools/launch.rs", "libc: ends a launcher with its parent"),
    ("src/triton/", "the C interface of Triton"),
];

/// Crates that only these folders may use.
const CONFINED_CRATES: &[(&str, &[&str])] = &[
    ("mpi", &["src/collective/"]),
    // `device/memory.rs` reads the free memory of a GPU.
    ("cudarc", &["src/collective/", "src/device/memory.rs"]),
    ("polars", &["src/etl/"]),
];

/// Files and folders that may print.
const PRINTING: &[&str] = &["src/base/console.rs", "src/cli/"];

/// An arrow from one module or package to another, with a place in the sources.
type Graph = BTreeMap<(String, String), String>;

fn edges(graph: &Graph) -> BTreeSet<(&str, &str)> {
    graph.keys().map(|(from, to)| (from.as_str(), to.as_str())).collect()
}

/// Groups of nodes that reach each other.
fn circles(graph: &Graph) -> BTreeSet<BTreeSet<&str>> {
    let nodes: BTreeSet<&str> =
        edges(graph).into_iter().flat_map(|(from, to)| [from, to]).collect();
    let reached: BTreeMap<&str, BTreeSet<&str>> =
        nodes.into_iter().map(|node| (node, reachable(graph, node))).collect();
    let mut circles = BTreeSet::new();
    for (node, reached_from_node) in &reached {
        let circle =
            reached_from_node.iter().copied().filter(|other| reached[other].contains(node));
        let circle: BTreeSet<&str> = circle.collect();
        if circle.len() > 1 {
            circles.insert(circle);
        }
    }
    circles
}

/// Nodes to which arrows lead from this one.
fn reachable<'a>(graph: &'a Graph, start: &'a str) -> BTreeSet<&'a str> {
    let edges = edges(graph);
    let mut found = BTreeSet::new();
    let mut pending = vec![start];
    while let Some(node) = pending.pop() {
        let next: Vec<&str> =
            edges.iter().filter(|(from, _)| *from == node).map(|(_, to)| *to).collect();
        pending.extend(next.into_iter().filter(|to| found.insert(*to)));
    }
    found
}

/// One line for each node: the nodes that it uses, each with an example.
fn show(graph: &Graph) -> String {
    let mut text = String::new();
    let mut last = "";
    for ((from, to), place) in graph {
        if last != from {
            writeln!(text, "{from} uses").unwrap();
            last = from;
        }
        writeln!(text, "    {to:<12} {place}").unwrap();
    }
    text
}

/// The modules that `src/lib.rs` lists, in its order.
fn modules() -> Vec<String> {
    let lib = Source::read(Path::new("src/lib.rs"));
    lib.words_between(&["mod"], ";").into_iter().map(str::to_owned).collect()
}

/// The folders of the packages below `src`, deepest first.
fn packages() -> Vec<PathBuf> {
    let mut manifests = files_below(&root().join("src"));
    manifests.retain(|path| path.ends_with("Cargo.toml"));
    let folder = |path: &PathBuf| path.parent().unwrap().strip_prefix(root()).unwrap().to_owned();
    let mut folders: Vec<_> = manifests.iter().map(folder).collect();
    folders.sort_by_key(|folder| std::cmp::Reverse(folder.components().count()));
    folders
}

/// Sources of the main package, each with its top-level module; `main.rs` with its `allocator.rs`,
/// and `lib.rs`, have none.
fn main_package() -> Vec<(String, Source)> {
    let packages = packages();
    let mut sources = sources("src");
    sources.retain(|source| !packages.iter().any(|package| source.path.starts_with(package)));
    let module = |source: Source| {
        let path = source.path.strip_prefix("src").unwrap().with_extension("");
        let first = path.iter().next().unwrap().to_str().unwrap().to_owned();
        (first, source)
    };
    let with_module = sources.into_iter().map(module);
    with_module
        .filter(|(module, _)| !["main", "allocator", "lib"].contains(&module.as_str()))
        .collect()
}

/// Arrows between the top-level modules of the main package.
fn module_graph() -> Graph {
    let modules = modules();
    let lib = Source::read(Path::new("src/lib.rs"));
    // `pub use bireme_etl as etl` makes a package look like a module.
    let reexported = lib.words_between(&["as"], ";");
    let mut graph = Graph::new();
    for (from, source) in main_package() {
        assert!(
            modules.contains(&from),
            "src/lib.rs does not list the module of {}",
            source.path()
        );
        for (to, line) in source.crate_paths() {
            let place = format!("{}:{line}", source.path());
            let is_known = modules.iter().any(|module| module == to) || reexported.contains(&to);
            assert!(is_known, "{place}: src/lib.rs has no `{to}`");
            if from != to && !reexported.contains(&to) {
                graph.entry((from.clone(), to.to_owned())).or_insert(place);
            }
        }
    }
    graph
}

/// Arrows between the packages of the workspace.
fn package_graph() -> Graph {
    let mut packages = packages();
    packages.push(PathBuf::new());
    let manifests: Vec<(PathBuf, toml::Table)> = packages
        .into_iter()
        .map(|folder| folder.join("Cargo.toml"))
        .map(|path| (path.clone(), fs::read_to_string(root().join(path)).unwrap().parse().unwrap()))
        .collect();
    let name = |manifest: &toml::Table| manifest["package"]["name"].as_str().unwrap().to_owned();
    let names: BTreeSet<String> = manifests.iter().map(|(_, manifest)| name(manifest)).collect();
    let mut graph = Graph::new();
    for (path, manifest) in &manifests {
        for kind in ["dependencies", "build-dependencies", "dev-dependencies"] {
            let dependencies = manifest.get(kind).and_then(toml::Value::as_table);
            for dependency in dependencies.into_iter().flat_map(toml::Table::keys) {
                if names.contains(dependency) {
                    let place = format!("{} [{kind}]", path.display());
                    graph.insert((name(manifest), dependency.clone()), place);
                }
            }
        }
    }
    graph
}

/// Whether a path is one of these files or lies in one of these folders, which end in `/`.
fn is_in(path: &str, places: &[&str]) -> bool {
    places.iter().any(|place| path == *place || place.ends_with('/') && path.starts_with(place))
}

#[test]
fn modules_use_only_modules_that_come_before_them() {
    let graph = module_graph();
    let modules = modules();
    assert_eq!(modules.last().map(String::as_str), Some("cli"), "`cli` comes last in src/lib.rs");
    let position = |name: &str| modules.iter().position(|module| module == name);
    let edges = edges(&graph).into_iter();
    let against: BTreeSet<_> = edges.filter(|(from, to)| position(from) < position(to)).collect();
    let known = BTreeSet::from_iter(AGAINST_THE_ORDER.iter().copied());
    assert_eq!(
        against,
        known,
        "arrows against the order of src/lib.rs, and known ones\n{}",
        show(&graph)
    );
}

#[test]
fn no_modules_depend_on_each_other() {
    let graph = module_graph();
    let known: BTreeSet<BTreeSet<&str>> =
        CIRCLES.iter().map(|circle| circle.iter().copied().collect()).collect();
    assert_eq!(circles(&graph), known, "circles of modules, and known ones\n{}", show(&graph));
}

#[test]
fn no_packages_depend_on_each_other() {
    let graph = package_graph();
    assert!(graph.len() > 5, "{}", show(&graph));
    assert!(circles(&graph).is_empty(), "{:?}\n{}", circles(&graph), show(&graph));
}

#[test]
fn unsafe_code_is_where_it_is_listed() {
    let mut listed: BTreeSet<&str> = UNSAFE.iter().map(|(place, _)| *place).collect();
    for source in sources("src") {
        let lines = source.lines_with(&["unsafe"]);
        let place =
            UNSAFE.iter().map(|(place, _)| *place).find(|place| is_in(source.path(), &[place]));
        match place {
            Some(place) if !lines.is_empty() => _ = listed.remove(place),
            Some(_) => {}
            None => assert!(lines.is_empty(), "`unsafe` in {}, lines {lines:?}", source.path()),
        }
    }
    assert!(listed.is_empty(), "`unsafe` no longer occurs in {listed:?}");
}

#[test]
fn heavy_crates_are_used_where_they_belong() {
    let sources = sources("src");
    for (name, places) in CONFINED_CRATES {
        let mut unused: BTreeSet<&str> = places.iter().copied().collect();
        for source in &sources {
            let lines = source.extern_paths(name);
            if let Some(line) = lines.first() {
                let is_allowed = is_in(source.path(), places);
                assert!(is_allowed, "`{name}` in {}, line {line}", source.path());
                unused.retain(|place| !is_in(source.path(), &[place]));
            }
        }
        assert!(unused.is_empty(), "`{name}` is not used any more in {unused:?}");
    }
}

#[test]
fn only_the_console_and_the_commands_print() {
    for source in sources("src") {
        // What a build script prints is for cargo.
        if is_in(source.path(), PRINTING) || source.path.ends_with("build.rs") {
            continue;
        }
        for name in ["print", "println", "eprint", "eprintln", "dbg"] {
            let lines = source.lines_with(&[name, "!"]);
            assert!(lines.is_empty(), "`{name}!` in {}, lines {lines:?}", source.path());
        }
    }
}

#[test]
fn lines_end_at_100_columns() {
    let folders = ["src", "tests/it", "tests/etl", "tests/fuzz/bin", "benches"];
    for path in folders.iter().flat_map(|folder| files_below(&root().join(folder))) {
        if !path.extension().is_some_and(|end| ["rs", "cpp", "h"].iter().any(|name| end == *name)) {
            continue;
        }
        for (number, line) in (1..).zip(fs::read_to_string(&path).unwrap().lines()) {
            assert!(line.chars().count() <= 100, "{}, line {number}", path.display());
        }
    }
}

#[test]
fn test_modules_import_from_support_only() {
    for folder in ["tests/it", "tests/etl"] {
        for source in sources(folder) {
            for (name, line) in source.crate_paths() {
                assert_eq!(name, "support", "{}, line {line}", source.path());
            }
            // `super` of a test module is the crate.
            let is_test_module = source.path.parent() == Some(Path::new(folder));
            let lines = source.lines_with(&["super", ":", ":"]);
            assert!(
                !is_test_module || lines.is_empty(),
                "`super` in {}, lines {lines:?}",
                source.path()
            );
        }
    }
}
