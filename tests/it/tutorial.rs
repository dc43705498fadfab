//! The commands of docs/tutorial.md work as they are written.

use std::env;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::support::process::PROGRAM;
use crate::support::process::run_within;

/// The lines of the blocks that are marked as run.
fn commands(page: &str) -> String {
    let blocks = page.split("\n```sh run\n").skip(1);
    blocks
        .map(|block| block.split_once("\n```").expect("a block ends").0.to_owned() + "\n")
        .collect()
}

#[test]
fn the_commands_of_the_tutorial_run_in_order() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = fs::read_to_string(root.join("docs/tutorial.md")).unwrap();
    let commands = commands(&page);
    for command in
        ["synth", "preprocess", "train", "evaluate", "report", "export", "serve", "recommend"]
    {
        assert!(commands.contains(&format!("bireme {command} ")), "no `{command}` in the tutorial");
    }

    let dir = tempfile::tempdir().unwrap();
    symlink(root.join("configs"), dir.path().join("configs")).unwrap();
    let programs = Path::new(PROGRAM).parent().unwrap().to_owned();
    let path = env::var_os("PATH").unwrap_or_default();
    let path = env::join_paths(std::iter::once(programs).chain(env::split_paths(&path))).unwrap();
    let script = format!("set -eu\ntrap 'kill ${{server:-}} 2>/dev/null || :' EXIT\n{commands}");
    let mut shell = Command::new("sh");
    shell.args(["-c", &script]).current_dir(dir.path()).env("PATH", path);
    let finished = run_within(&mut shell, Duration::from_secs(600)).success();
    assert!(finished.stdout.contains("item_ids"), "{}", finished.stdout);
    assert!(finished.stdout.contains("recommended"), "{}", finished.stdout);
    assert!(dir.path().join("report/index.html").is_file());
}
