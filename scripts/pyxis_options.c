/*
 * The options that NVIDIA's pyxis adds to srun and sbatch (its release 0.24.0), for the Slurm sandbox: Slurm accepts them,
 * and nothing follows from them. On a cluster pyxis itself registers them, and runs the task in a container.
 */
#include <stddef.h>

#include <slurm/spank.h>

SPANK_PLUGIN(pyxis_options, 1)

static int accept_option(int value, const char *argument, int remote)
{
	(void)value, (void)argument, (void)remote;
	return 0;
}

/* Slurm adds the option's name to the usage text by itself; 1: it takes an argument. */
#define WITH_ARGUMENT(name, argument) {name, argument, "[pyxis] accepted, without effect", 1, 0, accept_option}
#define FLAG(name) {name, NULL, "[pyxis] accepted, without effect", 0, 0, accept_option}

static struct spank_option options[] = {
	WITH_ARGUMENT("container-image", "IMAGE"),
	WITH_ARGUMENT("container-mounts", "SRC:DST[:FLAGS][,SRC:DST...]"),
	WITH_ARGUMENT("container-workdir", "PATH"),
	WITH_ARGUMENT("container-name", "NAME"),
	WITH_ARGUMENT("container-save", "PATH"),
	WITH_ARGUMENT("container-env", "NAME[,NAME...]"),
	WITH_ARGUMENT("container-unshare", "NS[,NS...]"),
	FLAG("container-mount-home"),
	FLAG("no-container-mount-home"),
	FLAG("container-remap-root"),
	FLAG("no-container-remap-root"),
	FLAG("container-entrypoint"),
	FLAG("no-container-entrypoint"),
	FLAG("container-entrypoint-log"),
	FLAG("container-writable"),
	FLAG("container-readonly"),
	SPANK_OPTIONS_TABLE_END,
};

int slurm_spank_init(spank_t spank, int argc, char **argv)
{
	(void)argc, (void)argv;
	if (spank_context() == S_CTX_SLURMD)
		return 0;
	for (struct spank_option *option = options; option->name; option++)
		if (spank_option_register(spank, option) != ESPANK_SUCCESS)
			return -1;
	return 0;
}
