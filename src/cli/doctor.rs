//! `bireme doctor`.

use std::io::Write;
use std::path::{Path, PathBuf};

use bireme_base::console;
use bireme_base::output::{OutputError, OutputFile};
use bireme_tools::findings::{self, Findings};
use clap::Args;

use super::failure::{Failure, print};
use super::job::Job;
use crate::device::DeviceChoice;
use crate::doctor;

#[derive(Args)]
pub(super) struct DoctorArgs {
    /// Folder on the file system to measure, such as that of the run directories
    #[arg(long, value_name = "DIR", default_value = ".")]
    dir: PathBuf,
    /// Device of the ranks
    #[arg(long, value_enum, default_value_t = DeviceChoice::Auto)]
    device: DeviceChoice,
    /// Also write the findings to this file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

pub(super) fn run(args: &DoctorArgs) -> Result<(), Failure> {
    let job = Job::without_config(args.device)?;
    let root = job.collective.root();
    job.agree(root.map_or(Ok(()), |_| findings::check_folder(&args.dir)))?;
    let file = args.json.as_ref().filter(|_| root.is_some());
    let file = file.map(|file| OutputFile::create(file, &mut console::log)).transpose();
    let file = job.agree(file)?;
    let found = doctor::examine(&job.place, &args.dir, &*job.collective)?;
    if root.is_some() {
        for advice in &found.advice {
            console::log(&format!("warning: {advice}"));
        }
        if let Some((file, path)) = file.zip(args.json.as_deref()) {
            write_json(file, path, &found)?;
        }
        print(&found.lines.join("\n"))?;
    }
    Ok(())
}

fn write_json(mut file: OutputFile, path: &Path, found: &Findings) -> Result<(), OutputError> {
    let json = serde_json::to_string_pretty(found).expect("numbers and words are JSON");
    file.write_all(json.as_bytes()).map_err(|source| OutputError::Io {
        action: "write",
        path: path.to_owned(),
        source,
    })?;
    file.publish()
}
