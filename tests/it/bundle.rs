//! The bundle trains on a machine with libtorch and without MPI.

use std::env;
use std::fs;
use std::process::{Command, Output};

use crate::support::compare::assert_identical;
use crate::support::configs::RESUMABLE;
use crate::support::files::root;
use crate::support::process::PROGRAM;
use crate::support::session_shop::SessionShop;

fn run(command: &mut Command) -> Output {
    let ran = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(ran.status.success(), "{command:?}: {ran:#?}");
    ran
}

#[test]
fn a_bundle_trains_on_two_ranks_in_a_root_without_mpi() {
    let project = root();
    // On the project's file system, so that libtorch can be linked into the root.
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let root = folder.path().join("root");
    let made = Command::new(project.join("tests/bare_root.sh")).arg(&root).output().unwrap();
    match made.status.code() {
        Some(0) => {}
        Some(2) => {
            assert_ne!(env::var("REQUIRE_BARE_ROOT").as_deref(), Ok("1"), "{made:?}");
            println!("skipped: {}", String::from_utf8_lossy(&made.stderr).trim());
            return;
        }
        _ => panic!("{made:?}"),
    }

    let (bundle, moved) = (folder.path().join("bundle"), root.join("opt/elsewhere"));
    run(Command::new(project.join("launch/bundle.sh")).arg(&bundle).env("BIREME_BIN", PROGRAM));
    fs::rename(&bundle, &moved).unwrap();
    // As it lies here, with the libraries that it looks for beside itself.
    let libtorch = fs::canonicalize(project.join(".libtorch")).unwrap();
    run(Command::new("cp")
        .args(["--recursive", "--link"])
        .arg(&libtorch)
        .arg(root.join("opt/libtorch")));

    let shop = SessionShop::new(100);
    shop.train("unbroken", &RESUMABLE).success();
    fs::create_dir(root.join("shop")).unwrap();
    run(Command::new("cp")
        .arg("--recursive")
        .arg(shop.data())
        .arg(shop.config())
        .arg(root.join("shop")));
    // A mount namespace of its own, so that nothing stays mounted.
    let inside = |command: &str| {
        let mounts = "mount -t proc proc \"$0/proc\" && mount -t sysfs sys \"$0/sys\" && mount \
                      --rbind /dev \"$0/dev\"";
        let script = format!("{mounts} && exec chroot \"$0\" /bin/sh -c \"$1\"");
        let mut shell = Command::new("unshare");
        // Nothing of this machine's environment but what every machine has.
        shell.args(["--mount", "sh", "-c", &script]).arg(&root).arg(command).env_clear();
        shell.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        shell
    };
    let mpi = inside("command -v mpirun || ls /usr/lib/x86_64-linux-gnu/libmpi*").output().unwrap();
    assert!(!mpi.status.success() && mpi.stdout.is_empty(), "{mpi:?}");
    let set: Vec<String> = RESUMABLE.iter().map(|word| format!("'{word}'")).collect();
    let train = format!(
        "train --config /shop/config.toml --data /shop/data --run-dir /shop/run {}",
        set.join(" ")
    );
    let ran = run(&mut inside(&format!(
        "BIREME_LIBTORCH=/opt/libtorch/torch BIREME_RANKS=2 /opt/elsewhere/launch/local.sh {train}"
    )));
    let message = String::from_utf8_lossy(&ran.stderr);
    assert!(message.contains("ranks 2 (mpi)"), "{message}");
    run(Command::new("cp").arg("--recursive").arg(root.join("shop/run")).arg(shop.run_dir("run")));
    assert_identical(&shop, "run", "unbroken");
}
