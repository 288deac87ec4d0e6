#include <gim_kernels.h>
#include <stdio.h>

int main(void)
{
    printf("%s: %zu kernels\n", gim_targets(), gim_variant_count());
    return gim_variant_count() == 0;
}
