//! `bireme export`.

use std::path::PathBuf;

use bireme_base::console;
use clap::{Args, ValueEnum};
use tch::Kind;

use super::failure::Failure;
use super::interrupt::clean_up_on_signals;
use super::warn_of_skipped;
use crate::export::{self, Exported};

#[derive(Args)]
pub(super) struct ExportArgs {
    /// Run directory of `bireme train`
    #[arg(long, value_name = "RUN")]
    run_dir: PathBuf,
    /// Name of a folder in `RUN/checkpoints` [default: the newest]
    #[arg(long, value_name = "CHECKPOINT")]
    checkpoint: Option<String>,
    /// Model repository; its other models are kept
    #[arg(long, value_name = "REPO")]
    out: PathBuf,
    /// Name of the model; an existing model gets a new version
    #[arg(long, default_value = "bireme")]
    name: String,
    /// Type of the vector tables and of the scores
    #[arg(long, value_enum, default_value_t = TableType::F32)]
    tables: TableType,
    // Removed; scripts that use it still work, with a warning.
    #[arg(long, hide = true)]
    python_backend: bool,
    /// Triton backend that preprocesses [default: `libtriton_bireme.so` beside this program]
    #[arg(long, value_name = "FILE")]
    backend_library: Option<PathBuf>,
}

/// The types of [`Kind`], which is libtorch's, that tables can have.
#[derive(Clone, Copy, ValueEnum)]
enum TableType {
    F32,
    Bf16,
    F16,
}

impl From<TableType> for Kind {
    fn from(of: TableType) -> Self {
        match of {
            TableType::F32 => Self::Float,
            TableType::Bf16 => Self::BFloat16,
            TableType::F16 => Self::Half,
        }
    }
}

impl ExportArgs {
    fn options(&self) -> export::ExportOptions {
        export::ExportOptions {
            run_dir: self.run_dir.clone(),
            checkpoint: self.checkpoint.clone(),
            out: self.out.clone(),
            name: self.name.clone(),
            tables: self.tables.into(),
            library: self.backend_library.clone().unwrap_or_else(library_beside_program),
        }
    }
}

/// Path of the Triton backend in the build folder.
pub(super) fn library_beside_program() -> PathBuf {
    std::env::current_exe().unwrap_or_default().with_file_name(export::LIBRARY)
}

pub(super) fn run(args: &ExportArgs) -> Result<(), Failure> {
    if args.python_backend {
        console::log(&format!(
            "warning: `--python-backend` is ignored: it was removed, and `{}` preprocesses instead",
            export::LIBRARY
        ));
    }
    clean_up_on_signals()?;
    write_export(&args.options())
}

pub(super) fn write_export(options: &export::ExportOptions) -> Result<(), Failure> {
    let Exported { version, n_items, skipped } = export::export(options, &mut console::log)?;
    warn_of_skipped(&skipped);
    let (name, out) = (&options.name, options.out.display());
    console::note(&format!("version {version} of `{name}`, {n_items} items, is in `{out}`"));
    Ok(())
}
